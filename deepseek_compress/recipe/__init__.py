"""Recipes: YAML text -> validated stages; every mistake carries the line it stands on."""

from deepseek_compress.recipe.schema import Calibration, Changes, Recipe, Step, parse_recipe, read_recipe

__all__ = ["Calibration", "Changes", "Recipe", "Step", "parse_recipe", "read_recipe"]
