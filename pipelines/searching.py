"""The inference-schedule search of an evaluation: which sampler, grid and length serve this model best on this data."""

import json
from dataclasses import asdict, replace
from typing import Any, Literal

from diffsr_core.sampling import SamplingRecipe
from diffsr_core.search import GridChoice, Scored, choices, search
from pipelines import storage
from pipelines.engine import say
from pipelines.models import ResolvedModel
from pipelines.scoring import METRICS, Dataset, score_dataset

SEARCH_FILES = ("search.json", "search.md")


def search_schedule(
    candidates: list[GridChoice],
    dataset: Dataset,
    model: ResolvedModel,
    recipe: SamplingRecipe,
    *,
    objective: str,
    output: str,
    engine: Literal["ray", "local"],
    num_workers: int,
) -> SamplingRecipe:
    """Return the recipe with the best candidate's schedule; write search.json and search.md, best first.

    objective: one of METRICS, its mean over the images that could be scored, the higher the better. Raises ValueError
    when no image can be scored.
    """
    measured: dict[GridChoice, dict[str, Any]] = {}

    def score(choice: GridChoice) -> float:
        rows = score_dataset(
            dataset,
            model,
            replace(recipe, **asdict(choice)),
            baselines=(),
            output=output,
            engine=engine,
            num_workers=num_workers,
            label=f"search {choice.sampler} {choice.grid} {choice.num_steps}",
        )
        scored = [row for row in rows if not row["reason"]]
        if not scored:
            raise ValueError(f"dataset ({dataset.source}) must hold at least one readable image; it holds none")
        names = (*(f"model_{name}" for name in METRICS), "seconds")
        measured[choice] = {name: sum(row[name] for row in scored) / len(scored) for name in names}
        return float(measured[choice][f"model_{objective}"])

    found = search(score, candidates, maximise=True)
    table = _table(found, measured)
    say(table)
    document = {
        "objective": objective,
        "data": dataset.digest,
        "model": model.digest,
        "found": [{**asdict(each.choice), **measured[each.choice]} for each in found],
    }
    for name, text in zip(SEARCH_FILES, (json.dumps(document, indent=1), table), strict=True):
        storage.publish(storage.join(output, name), text.encode())
    return replace(recipe, **asdict(found[0].choice))


def candidates_of(samplers: tuple[str, ...], grids: tuple[str, ...], lengths: tuple[int, ...]) -> list[GridChoice]:
    """Return the candidates, none without lengths. Raises ValueError for unknown names or no sensible pair."""
    return choices(samplers, grids, lengths) if lengths else []


def _table(found: list[Scored], measured: dict[GridChoice, dict[str, Any]]) -> str:
    lines = [
        f"| sampler | grid | steps | {' | '.join(METRICS)} | s/image |",
        "|---|---|---:|" + "---:|" * (len(METRICS) + 1),
    ]
    for choice, _ in found:
        values = measured[choice]
        cells = [f"{values[f'model_{name}']:.4f}" for name in METRICS]
        lines.append(
            f"| {choice.sampler} | {choice.grid} | {choice.num_steps} | {' | '.join(cells)} | {values['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"
