"""A recipe as a value: read it with `load`, hand it on with `freeze`."""

from mpt.recipe.frozen import absolute, differences, freeze, recipe_hash
from mpt.recipe.load import load
from mpt.recipe.recipe import Recipe

__all__ = ["Recipe", "absolute", "differences", "freeze", "load", "recipe_hash"]
