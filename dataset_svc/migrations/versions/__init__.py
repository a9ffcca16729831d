"""One module per schema change; the number at its start gives the order."""
