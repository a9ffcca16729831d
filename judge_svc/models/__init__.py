"""Language models that the rubric may ask."""
