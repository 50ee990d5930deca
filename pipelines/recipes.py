"""The recipe of a pair set in words that a person understands."""

import json
from collections.abc import Callable, Mapping
from typing import Any


def degradation_of(recipe: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and settings of the recipe's degradation, which is a name or JSON."""
    text = str(recipe.get("degradation", "bicubic"))
    document: dict[str, Any] = json.loads(text) if text.startswith("{") else {"name": text}
    return document["name"], document.get("settings", {})


def recipe_in_words(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, how) for a person; a setting for which there are no words is shown as it is."""
    words: list[tuple[str, str]] = []
    told = {"format"}
    for label, names, phrase in _PHRASES:
        if set(names) <= recipe.keys():
            told |= set(names)
            words += [(label, text)] if (text := phrase(recipe)) else []
    return words + [(name, json.dumps(recipe[name])) for name in sorted(recipe.keys() - told)]


def _low_resolution(recipe: Mapping[str, Any]) -> str:
    if recipe["lr_source"]:
        apart = f"refused when they are more than {recipe['max_misalignment']:g} LR px apart"
        return f"real twins named {recipe['lr_name']}, {apart}"
    name, settings = degradation_of(recipe)
    drawn = [f"{key.replace('_', ' ')} {_drawn(setting)}" for key, setting in sorted(settings.items())]
    return f"made from HR by {name}" + (f" ({', '.join(drawn)})" if drawn else "")


def _drawn(setting: float | list[float]) -> str:
    low, high = setting if isinstance(setting, list) else (setting, setting)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _patches(recipe: Mapping[str, Any]) -> str:
    side = recipe["patch"]
    cut = "in a grid without overlap" if recipe["crops"] == "grid" else "at random places, which may overlap"
    return f"{side} × {side} px, cut {cut}; at most {recipe['max_per_image']:,} of one image, chosen by hash"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _copies(recipe: Mapping[str, Any]) -> str:
    if recipe["duplicates"] == "keep":
        return "kept"
    where = {"set": "the whole set", "image": "one image"}.get(recipe["duplicates"], recipe["duplicates"])
    return f"dropped within {where}: at most {recipe['hash_distance']} of the 64 bits of their perceptual hashes differ"


def _space(recipe: Mapping[str, Any]) -> str:
    known = {"srgb": "converted to sRGB", "native": "as stored, converted to nothing"}
    return known.get(recipe["working_space"], f"converted to the profile {recipe['working_space']}")


def _value_range(recipe: Mapping[str, Any]) -> str:
    if not recipe["value_range"]:
        return "the whole range of the sample type"
    low, high = recipe["value_range"]
    return f"{low:g} is black and {high:g} is white in samples of more than 8 bits"


def _splits(recipe: Mapping[str, Any]) -> str:
    val, test = 100 * recipe["val_share"], 100 * recipe["test_share"]
    return f"{100 - val - test:.4g} % train, {val:.4g} % val, {test:.4g} % test, by a hash of each image's content"


def _codec(recipe: Mapping[str, Any]) -> str:
    name = {"webp": "WebP", "png": "PNG"}.get(recipe["codec"], recipe["codec"])
    return f"lossless {name}; grey as PNG, more than 8 bits or 3 bands as npy + zstd"


Phrase = tuple[str, tuple[str, ...], Callable[[Mapping[str, Any]], str]]
_PHRASES: list[Phrase] = [
    ("Scale", ("scale",), lambda r: f"{r['scale']} HR pixels per LR pixel along each axis"),
    ("Low resolution", ("degradation", "lr_source", "lr_name", "max_misalignment"), _low_resolution),
    ("Patches", ("patch", "crops", "max_per_image"), _patches),
    (
        "Reductions",
        ("reductions",),
        lambda r: f"cut from images reduced by {_listed(r['reductions'])} (1: as they are)",
    ),
    ("Flat patches", ("min_deviation",), lambda r: f"dropped: no channel deviates by {r['min_deviation']:g} of 255"),
    ("Near copies", ("duplicates", "hash_distance"), _copies),
    ("Colours", ("working_space",), _space),
    ("Bands", ("bands",), lambda r: _listed(r["bands"])),
    ("Black and white", ("value_range",), _value_range),
    ("Splits", ("val_share", "test_share"), _splits),
    ("Stored as", ("codec",), _codec),
    (
        "Largest image",
        ("max_megapixels", "max_raster_megapixels"),
        lambda r: f"{r['max_megapixels']:,g} megapixels; {r['max_raster_megapixels']:,g} where it is read by windows",
    ),
    ("Seed", ("seed",), lambda r: str(r["seed"])),
]
