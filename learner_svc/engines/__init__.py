"""Engines that hold weights and optimizer state and perform forward, backward and step."""
