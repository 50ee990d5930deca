"""The registry's aliases: which version of a model is the champion, which one was before, and how that changes.

MLflow has no compare-and-swap for aliases. Each change reads the alias again just before it writes, so a champion that
is not the one that was judged is never replaced; what remains is the moment between that read and the write (some
milliseconds), in which a writer that does not share our lease could be overwritten.
"""

import mlflow
from mlflow.exceptions import MlflowException

from pipelines.engine import say
from pipelines.mlflow_store import place

CHAMPION, PREVIOUS = "champion", "previous_champion"
ROLLED_BACK = "diffsr.rolled_back"  # tag of a version that was champion and was rolled back from
EVIDENCE, VERDICT = "diffsr.evidence", "diffsr.verdict"  # tags: the run of the last judgement, and how it ended
PASSED, REFUSED = "passed", "refused"  # of VERDICT; the champion alias says who was promoted
OVERTAKEN = "passed, not promoted: the champion changed"  # of VERDICT
PROMOTED_FROM = "diffsr.promoted_from"  # tag: the version that was champion before, or None


def alias_version(client: mlflow.MlflowClient, name: str, alias: str) -> int | None:
    """Return the version that an alias points to, or None where there is no such alias or model.

    Any other error of the registry passes through: read as "no champion" it would let any model in.
    """
    try:
        value = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if is_missing(error):
            return None
        raise
    return None if value is None else int(value)


def newest_version(client: mlflow.MlflowClient, name: str) -> int:
    """Return the highest version of a registered model that was not rolled back; ValueError when there is none."""
    found = client.search_model_versions(f"name='{name}'")
    if not found:
        raise ValueError(f"model ({name}) must have a registered version at {place()}; train one first")
    versions = [int(entry.version) for entry in found if ROLLED_BACK not in entry.tags]
    if not versions:
        raise ValueError(
            f"model ({name}) must have a version that was not rolled back: train one, or name one with --challenger"
        )
    passed = sorted(int(entry.version) for entry in found if int(entry.version) > max(versions))
    if passed:
        names = ", ".join(f"v{version}" for version in passed)
        say(f"promote: {name} {names} was rolled back and is passed over; --challenger would name it")
    return max(versions)


def move_champion(client: mlflow.MlflowClient, name: str, version: int, *, expected: int | None, evidence: str) -> None:
    """Point the champion alias at a version and keep the old one as previous_champion.

    A champion that is not `expected`, the one that was judged, raises Overtaken: it is read again before anything is
    written, and again just before the aliases. The champion moves last: killed before, it is the old one with its
    evidence, previous_champion at most names it as well, and the same promotion goes through.
    """
    _check_champion(client, name, expected)
    before = client.get_model_version(name, str(version)).tags.get(PROMOTED_FROM)
    client.set_model_version_tag(name, str(version), EVIDENCE, evidence)
    client.set_model_version_tag(name, str(version), PROMOTED_FROM, str(expected))
    try:
        _check_champion(client, name, expected)
    except Overtaken:  # it was not promoted, so it must not say so
        if before is None:
            client.delete_model_version_tag(name, str(version), PROMOTED_FROM)
        else:
            client.set_model_version_tag(name, str(version), PROMOTED_FROM, before)
        raise
    if expected is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(expected))
    client.set_registered_model_alias(name, CHAMPION, str(version))
    if ROLLED_BACK in client.get_model_version(name, str(version)).tags:
        client.delete_model_version_tag(name, str(version), ROLLED_BACK)


def restore_champion(client: mlflow.MlflowClient, name: str, version: int, *, expected: int) -> None:
    """Give the champion alias back to the previous champion, and mark the one that loses it as rolled back.

    There is no previous champion afterwards: a second rollback must not bring the bad version back. Killed after the
    mark, the same rollback goes through; killed after the move, previous_champion names the champion itself.
    """
    _check_champion(client, name, expected)
    client.set_model_version_tag(name, str(expected), ROLLED_BACK, f"to v{version}")
    client.set_registered_model_alias(name, CHAMPION, str(version))
    client.delete_registered_model_alias(name, PREVIOUS)


def _check_champion(client: mlflow.MlflowClient, name: str, expected: int | None) -> None:
    found = alias_version(client, name, CHAMPION)
    if found != expected:
        raise Overtaken(found=found, expected=expected)


def _version(version: int | None) -> str:
    return "none" if version is None else f"v{version}"


def is_missing(error: MlflowException) -> bool:
    """Return whether a store says that there is no such thing, which is not the same as that it failed."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


class Overtaken(ValueError):
    """The champion is not the one that was compared; `found` is the version that it is by now, or None."""

    def __init__(self, *, found: int | None, expected: int | None) -> None:
        super().__init__(
            f"champion ({_version(found)}) must still be the one that was compared ({_version(expected)}); "
            "promote again"
        )
        self.found = found
