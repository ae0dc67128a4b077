"""Recipes: what a conversion does, as frozen values and as YAML."""
