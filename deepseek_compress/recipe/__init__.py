"""Recipes: YAML text -> validated stages; every mistake carries the line it stands on."""

from deepseek_compress.recipe.schema import Changes, Recipe, Step, parse_recipe, read_recipe

__all__ = ["Changes", "Recipe", "Step", "parse_recipe", "read_recipe"]
