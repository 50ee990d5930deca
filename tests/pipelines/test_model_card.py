"""Laws of pipelines.model_card: it says what the model is, in text that renders, whatever a person has written."""

import json
import math
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from diffsr_core import presets
from diffsr_core.checkpoint import CONFIG, model_files
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from pipelines.manifest import Manifest, Shard
from pipelines.model_card import Cost, plain, write_model_card

PAIR_RECIPE: dict[str, Any] = {
    "scale": 4, "degradation": "bicubic", "lr_source": None, "lr_name": "{stem}", "max_misalignment": 2.0,
    "patch": 64, "crops": "grid", "max_per_image": 200, "working_space": "srgb", "source": "/srv/private/archive",
}  # fmt: skip
MANIFEST = Manifest(
    recipe=PAIR_RECIPE,
    shards=[Shard(name="data/a.parquet", bytes=1, sha256="0" * 64, splits={"train": 12345, "val": 67, "test": 8})],
)
METRICS = {
    "step": 900, "loss": 0.1, "val_loss": 0.12345, "val_psnr_bicubic": 22.104, "val_psnr_regression": 23.456,
    "val_psnr_sample": 23.1, "val_ssim_regression": 0.70123, "val_ssim_sample": 0.6879, "val_lr_psnr_sample": 51.27,
    "val_lpips_sample": 0.2345,
}  # fmt: skip
HOSTILE = {
    "a heading": "x\n# Heading\n",
    "a rule and another front matter": "x\n---\nlicense: mit\n---\n",
    "HTML": "<script>alert(1)</script><!-- <img src=x onerror=y>",
    "an entity": "&lt;b&gt; &#35; &amp;",
    "a table": "a | b\n|--|--|\n| c | d |",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~",
    "links": "[a](https://b) ![c](https://d) <https://e> [f]: g",
    "code": "`a` ``` b\n```\nc\n~~~",
    "backslashes": "\\` \\\\` \\* \\",
    "what cannot be seen": "a\u202eb\x00c\u2028d\ud800e",
    "a template": "{{ preset }} {% if %} {# a #}",
    "a shell": "'; rm -rf / #$(a) `b` \"",
    "YAML": "!!python/object:os.system {a: b} 'c' \"d\" & e: *f",
}


def card(preset: str = "nano-x4", **changes: Any) -> str:
    """A preset's card, with other arguments than the usual where they are given."""
    known = presets.get(preset)
    arguments: dict[str, Any] = {
        "preset": preset, "config": known.model, "recipe": known.recipe, "manifest": MANIFEST,
        "num_weights": known.params, "step": 900, "metrics": METRICS,
    }  # fmt: skip
    return write_model_card(**{**arguments, **changes})


def split(text: str) -> tuple[dict[str, Any], str]:
    """The front matter, found as the hub finds it, and the Markdown."""
    match = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))", text)
    assert match is not None
    return yaml.safe_load(match[2]), text[match.end() :]


def tokens(text: str) -> list[Token]:
    found = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(split(text)[1])
    return [part for token in found for part in [token, *(token.children or [])] if token.type != "inline" or part]


def shape(text: str) -> list[tuple[str, str]]:
    """The marks of the rendered card, without its words."""
    return [(token.type, token.tag) for token in tokens(text) if token.type not in ("text", "text_special")]


def shown(text: str) -> str:
    """What a reader sees, blocks apart by newlines; code blocks too."""
    kinds = ("text", "text_special", "code_inline", "code_block", "fence")
    return "".join(
        token.content if token.type in kinds else "\n" if token.type in ("inline", "softbreak") else ""
        for token in tokens(text)
    )


def table(text: str) -> list[list[str]]:
    rows: list[list[str]] = []
    found = tokens(text)
    for token, following in zip(found, found[1:], strict=False):
        if token.type == "tr_open":
            rows.append([])
        if token.type in ("td_open", "th_open"):
            rows[-1].append(following.content)
    return rows


def headings(text: str) -> list[str]:
    found = tokens(text)
    return [b.content for a, b in zip(found, found[1:], strict=False) if a.type == "heading_open"]


def test_the_sections_come_in_order() -> None:
    sections = ["Use and limits", "Training data", "Training", "Validation", "How to use"]
    assert headings(card()) == ["nano-x4", *sections]


def test_the_front_matter_says_what_the_hub_asks() -> None:
    front, _ = split(card(weights_licence="Apache-2.0"))
    assert front["library_name"] == "diffsr" and front["license"] == "apache-2.0"
    assert front["tags"] == ["super-resolution", "diffusion", "x4"]
    assert front["datasets"] == [f"sha256:{MANIFEST.digest}"]
    assert front["metrics"] == ["psnr", "ssim", "lr_psnr", "lpips"]
    scores = front["model-index"][0]["results"][0]["metrics"]
    assert [(score["type"], score["value"]) for score in scores] == [
        ("psnr", 23.1), ("ssim", 0.6879), ("lr_psnr", 51.27), ("lpips", 0.2345)
    ]  # fmt: skip
    twin, _ = split(card("nano-x4-regression", metrics={}))
    assert "regression" in twin["tags"] and "metrics" not in twin and "model-index" not in twin


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        (None, {"license": "unknown"}),
        ("cc-by-4.0", {"license": "cc-by-4.0"}),
        ("ours: ask first", {"license": "other", "license_name": "ours: ask first"}),
        ("no", {"license": "other", "license_name": "no"}),
    ],
)
def test_a_licence_is_the_hubs_or_other_and_none_is_not_stated(licence: str | None, front: dict[str, str]) -> None:
    text = card(weights_licence=licence, data_licence=licence)
    found = {key: value for key, value in split(text)[0].items() if key.startswith("license")}
    assert found == front
    for what in ("weights", "data"):
        assert f"Licence of the {what}: {licence or 'not stated'}\n" in shown(text)


def test_the_table_has_the_scores_that_there_are() -> None:
    assert table(card()) == [
        ["method", "PSNR (dB) ↑", "SSIM ↑", "LR-PSNR (dB) ↑", "LPIPS ↓"],
        ["bicubic", "22.10", "–", "–", "–"],
        ["regression", "23.46", "0.7012", "–", "–"],
        ["sample", "23.10", "0.6879", "51.27", "0.2345"],
    ]
    assert table(card(metrics={"val_psnr_bicubic": 20.0})) == [["method", "PSNR (dB) ↑"], ["bicubic", "20.00"]]
    assert table(card(metrics={"loss": 1.0})) == [] and "None yet." in shown(card(metrics={}))
    without = Manifest(recipe=PAIR_RECIPE, shards=[])
    assert "no validation pairs" in shown(card(metrics={}, manifest=without))


def test_a_score_that_is_no_number_is_shown_and_kept_from_the_hub() -> None:
    text = card(metrics={"val_psnr_sample": math.nan, "val_ssim_sample": 0.5, "val_loss": math.inf})
    assert table(text)[1] == ["sample", "nan", "0.5000"] and split(text)[0]["metrics"] == ["ssim"]


@pytest.mark.parametrize(
    ("preset", "facts"),
    [
        ("nano-x4", ["4 times larger", "RGB, ×4", "RRDB, 5 blocks of 32 features", "SRDiff U-Net, 48, 96 channels",
                     "regression: what is diffused is the image less the encoder's own, times 10, in space-to-depth by",
                     "x_0, told the noise level", "cosine, 1,000 steps", "2,014,048 parameters", "Another seed"]),
        ("nano-x4-regression", ["A regression that", "Denoiser: none", "924,016 parameters"]),
        ("srdiff-df2k-x4", ["bicubic: what is diffused is the image less the bicubic LR, times 2\n", "the step t"]),
        ("sr3-lite-16-128", ["bicubic interpolation", "zero: what is diffused is the image itself\n", "told the amp"]),
        ("seed3-8-32", ["grey, ×4", "U-Net of biggan blocks, 64, 128, 256, 512, 1024 channels"]),
        ("sr3-16-128-regression", ["SR3 U-Net, 128, 256, 512, 1024, 1024 channels, run once on the LR enlarged by bi"]),
        ("ddpm-64", ["out of noise", "Encoder: none"]),
    ],
)  # fmt: skip
def test_the_family_is_told_in_words(preset: str, facts: list[str]) -> None:
    text = shown(card(preset))
    assert [fact for fact in facts if fact not in text] == []


@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_has_a_card_that_is_neat(preset: str) -> None:
    text = card(preset, cost=Cost(1, "cpu", 1, 1.0), name="m", parent="a" * 64, teacher="b" * 64)
    assert "\n\n\n" not in text and text.endswith("\n") and not text.endswith("\n\n")
    assert not re.search(r"[ \t]\n|None|undefined", text) and headings(text)[0] == preset
    marks = [mark for mark, _ in shape(text)]
    assert marks.count("table_open") == 1 and marks.count("ordered_list_open") == 1  # one list, not one for each item
    assert marks.count("bullet_list_open") == 4 and "paragraph_open" in marks


def test_the_limits_are_said() -> None:
    for preset in ("nano-x4", "nano-x4-regression", "ddpm-64"):
        text = shown(card(preset))
        assert all(word in text for word in ("evidence", "medical", "identify people", "measurements"))


def test_the_data_are_named_and_no_place_of_them() -> None:
    text = card(num_sources=1200, data_licence="CC BY 4.0, the photographers'")
    words = shown(text)
    assert MANIFEST.digest in words and "12,345 train, 67 val, 8 test, from 1,200 images" in words
    assert "made from HR by bicubic" in words and "64 × 64 px" in words and "CC BY 4.0, the photographers'" in words
    assert "/srv/private" not in text and "images\n" not in shown(card()).split("Pairs: ")[1].split("Low")[0]


def test_the_training_is_told() -> None:
    stages = (
        StageRecipe(name="diffusion", num_steps=1000, learning_rate=3e-4, loss="l2", weighting="min_snr"),
        StageRecipe(name="distillation", num_steps=500, learning_rate=1e-5, decay="constant", teacher_steps=15),
    )
    recipe = TrainingRecipe(
        stages=stages, batch_size=64, seed=7, precision="bf16", ema_half_lives_images=(2000, 50_000), crop_px=48
    )
    text = shown(card(recipe=recipe, step=1500, parent="a" * 64, teacher="b" * 64, name="m"))
    for fact in (
        "diffusion: 1,000 steps, L2 loss weighted by min-SNR, learning rate 0.0003 (cosine)\n",
        "distillation: 500 steps, L1 loss, learning rate 1e-05 (constant), from 15 steps of the teacher\n",
        "All 1,500 steps are done, 96,000 images seen.",
        "Batch: 64 images, seed 7\n",
        "AdamW, bf16\n",
        "half-life 2,000 images; kept beside it: 50,000\n",
        "dihedral, crops of 48 px\n",
        f"Fine-tuned from: model {'a' * 64}\n",
        f"Distilled from: model {'b' * 64}\n",
        "--model models:/m@champion --steps 1\n",
    ):
        assert fact in text
    unfinished = shown(card(recipe=recipe, step=900))
    assert "step 900 of 1,500, after 57,600 images" in unfinished
    assert "Fine-tuned" not in unfinished and "Distilled" not in unfinished and "--model FOLDER" in unfinished


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3600, "1 h 0 min"),
        (4980.4, "1 h 23 min"),
        (4e6, "1,111 h 6 min"),
    ],
)
def test_the_cost_is_told_for_a_person(seconds: float, words: str) -> None:
    text = shown(card(cost=Cost(seconds, "NVIDIA H200", 2, 1234.56)))
    assert f"It took {words}" in text and "on 2 workers (NVIDIA H200), at 1,234.6 images/s." in text
    assert "1 worker (cpu)" in shown(card(cost=Cost(seconds, "cpu", 1, 1.0))) and "It took" not in shown(card())


def filled(text: str) -> str:
    """A card with a text wherever a person, a file or a driver gives one."""
    manifest = replace(MANIFEST, recipe={**PAIR_RECIPE, "lr_source": "s3://lr", "lr_name": text, "working_space": text})
    from_person: dict[str, Any] = dict.fromkeys(
        ("weights_licence", "data_licence", "parent", "teacher", "name", "preset"), text
    )
    known, cost = presets.get("nano-x4"), Cost(1, text, 1, 1.0)
    return write_model_card(
        config=known.model, recipe=known.recipe, manifest=manifest, num_weights=1, step=9, metrics=METRICS, cost=cost,
        **from_person,
    )  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_text_is_text(kind: str) -> None:
    text = filled(HOSTILE[kind])
    assert shape(text) == shape(filled("harmless"))
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in HOSTILE[kind])
    words = shown(text)
    assert words.count(seen.strip()) >= 7
    front, harmless = split(text)[0], split(filled("harmless"))[0]
    assert front.keys() == harmless.keys() and front["license"] == "other" and front["license_name"] == seen
    text.encode()


def test_any_text_renders_as_itself() -> None:
    every = "".join(map(chr, range(32, 127)))
    for text in (every, every[::-1], "".join(a + b for a in "\\`*_[]<>|~&$#" for b in "\\`*_[]<>|~&$#!(;")):
        html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"x {plain(text)} x")
        children = html[1].children or []
        assert {token.type for token in children} <= {"text", "text_special"}
        assert "".join(token.content for token in children) == f"x {text} x"


def test_a_text_in_a_table_stays_in_its_cell() -> None:
    html = MarkdownIt("commonmark").enable("table").render(f"| a |\n|--|\n| {plain(HOSTILE['a table'])} |\n")
    assert html.count("<td>") == 1 and "<td>a | b\\n|--|--|\\n| c | d |</td>" in html


def test_a_model_of_any_name_is_one_word_of_the_command() -> None:
    command = next(line for line in card(name=HOSTILE["a shell"]).splitlines() if line.startswith("python "))
    assert shlex.split(command)[-1] == f"models:/{HOSTILE['a shell']}@champion"


def test_the_models_digest_covers_no_card() -> None:
    config, weights = presets.get("nano-x4").model, {"w": torch.ones(2)}
    made = [
        model_files(config, weights, weights, preset="nano-x4", card=card(cost=Cost(seconds, "cpu", 1, 9.0)))
        for seconds in (1.0, 2.0)
    ]
    assert made[0]["README.md"] != made[1]["README.md"]
    assert json.loads(made[0][CONFIG])["digest"] == json.loads(made[1][CONFIG])["digest"]


def test_a_model_of_one_step_says_where_it_starts_and_by_what_it_was_trained() -> None:
    config = replace(presets.get("anchored-x4").model, one_step=True)
    known = presets.get("anchored-x4").recipe
    recipe = replace(known, stages=(replace(known.stages[-1], name="energy", diversity=0.8),))
    text = card("anchored-x4", config=replace(config, start_level=0.7), recipe=recipe)
    assert "in one step from any noise level, unless --start-level says otherwise from 0.7: 0 has the most" in text
    assert "energy score of diversity 0.8, learning rate" in text and "L1 loss" not in text
    assert "**Sampling:** in one step, from noise\n" in card("anchored-x4", config=config, recipe=recipe)
    assert "**Sampling:**" not in card("anchored-x4")
