"""Recipes that come with the project: YAML files that hold only what differs from the defaults."""
