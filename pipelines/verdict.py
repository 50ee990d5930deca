"""A verdict as evidence: JSON for programs, Markdown for a log, and one HTML page that needs nothing else."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from pipelines.gate import BICUBIC, CHALLENGER, CHAMPION, Facts, Verdict
from pipelines.intervals import Interval
from pipelines.measures import FROM_ROWS, MEASURES
from pipelines.models import ResolvedModel
from pipelines.pages import pages, visible
from pipelines.report import markdown_table, winners
from pipelines.rules import Rules, to_yaml


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that a verdict rests on. It has no time and no run id: the same scores give the same bytes.

    It is published before the alias moves, and so does not claim that it did: the registry's tags and the run do.
    summary: method -> measure -> mean and 95 % interval; dataset: source, digest, images; sampling: method -> recipe
    with which it drew: flags fix it for both, what they leave out is the schedule that each model carries.
    """

    model: str
    challenger: ResolvedModel
    champion: ResolvedModel | None
    dataset: Mapping[str, Any]
    sampling: Mapping[str, Any]
    facts: Facts
    rules: Rules
    verdict: Verdict
    summary: Mapping[str, Mapping[str, Interval]]

    @property
    def title(self) -> str:
        """Who was judged, and how it went."""
        return f"{self.model} v{self.challenger.version} {'passed' if self.verdict.passed else 'was refused'}"

    @property
    def folder(self) -> str:
        """The judgement's own name, such as v2-against-v1-0a1b2c3d, which another judgement of v2 does not replace.

        The digits are of the models, the data set, the sampling and the rules: the same judgement has the same name.
        """
        champion = None if self.champion is None else self.champion.digest
        parts = [self.challenger.digest, champion, self.dataset["digest"], dict(self.sampling), asdict(self.rules)]
        digits = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        against = "none" if self.champion is None else f"v{self.champion.version}"
        return f"v{self.challenger.version}-against-{against}-{digits}"

    @property
    def measures(self) -> list[str]:
        """Return the measures that anybody has a mean of, in the order of tables."""
        return [name for name in MEASURES if any(name in found for found in self.summary.values())]

    def methods(self) -> dict[str, str]:
        """Return method -> label, in the order of tables."""
        labels = {CHALLENGER: f"challenger, v{self.challenger.version}"}
        if self.champion is not None:
            labels[CHAMPION] = f"champion, v{self.champion.version}"
        return {name: label for name, label in (labels | {BICUBIC: "bicubic"}).items() if self.summary.get(name)}

    def metrics(self) -> dict[str, float]:
        """Return the numbers for a run: every mean as `<method>_<measure>`, and the challenger's minus the opponent's
        as `difference_<measure>`."""
        found = {f"{method}_{name}": i.mean for method, means in self.summary.items() for name, i in means.items()}
        other = self.summary.get(self.facts.opponent, {})
        for name, interval in self.summary.get(CHALLENGER, {}).items():
            if name in other:
                found[f"difference_{name}"] = interval.mean - other[name].mean
        return found

    def document(self) -> dict[str, Any]:
        """Return the verdict as plain values, for JSON."""
        return {
            "model": self.model,
            "challenger": _named(self.challenger),
            "champion": None if self.champion is None else _named(self.champion),
            "opponent": self.facts.opponent,
            "verdict": "passed" if self.verdict.passed else "refused",
            "checks": [check._asdict() for check in self.verdict.checks],
            "gains": {name: interval._asdict() for name, interval in self.verdict.gains.items()},
            "summary": {m: {n: i._asdict() for n, i in means.items()} for m, means in self.summary.items()},
            "dataset": dict(self.dataset),
            "sampling": dict(self.sampling),
            "rules": asdict(self.rules),
        }

    def files(self) -> dict[str, bytes]:
        """Return the files of the evidence by name."""
        return {
            "verdict.json": json.dumps(self.document(), indent=1).encode(),
            "verdict.md": self.markdown().encode(),
            "promotion.html": self.page().encode(),
            "rules.yaml": to_yaml(self.rules).encode(),
        }

    def markdown(self) -> str:
        """Return the verdict, its checks and the means as GitHub Markdown."""
        lines = [f"# {_cell(self.title)}", "", _against(self), "", "| rule | holds | numbers |", "|---|---|---|"]
        lines += [
            f"| {check.rule} | {'yes' if check.holds else '**NO**'} | {_cell(check.text)} |"
            for check in self.verdict.checks
        ]
        if methods := self.methods():
            lines += ["", markdown_table(self.summary, {}, methods, self.measures)]
        return "\n".join(lines) + "\n"

    def page(self) -> str:
        """Return the HTML text."""
        environment = pages()
        environment.filters |= {"shown": shown}
        return environment.get_template("promotion.html").render(
            evidence=self,
            against=_against(self),
            failed=[check for check in self.verdict.checks if not check.holds],
            methods=self.methods(),
            measures={name: MEASURES[name] for name in self.measures},
            best={name: _best(self.summary, self.methods(), name) for name in self.measures},
            rules=to_yaml(self.rules),
        )


def shown(interval: Interval | None, metric: str) -> str:
    """Return a mean and its interval, such as "30.12 [29.80, 30.40]"; a dash where there is none."""
    if interval is None:
        return "–"
    mean, low, high = (f"{value:.{MEASURES[metric].digits}f}" for value in interval)
    return mean if low == high else f"{mean} [{low}, {high}]"


def _best(summary: Mapping[str, Mapping[str, Interval]], methods: Mapping[str, str], name: str) -> set[str]:
    """Return the methods with the best mean; none for costs, of which an interpolation's are no news."""
    means = {method: summary[method][name].mean for method in methods if name in summary[method]}
    return set() if name in FROM_ROWS else winners(means, MEASURES[name])


def _against(evidence: Evidence) -> str:
    champion = evidence.champion
    other = "bicubic, as there is no champion yet" if champion is None else f"the champion, v{champion.version}"
    return f"Judged against {other}, on {evidence.facts.num_images} images."


def _named(model: ResolvedModel) -> dict[str, Any]:
    return {"version": model.version, "digest": model.digest}


def _cell(text: str) -> str:
    """Return a text that cannot leave its cell, nor be read as markup."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
