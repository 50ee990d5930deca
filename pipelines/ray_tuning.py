"""Ray Tune as the carrier of trials: each in an actor of its own, ended early where the scheduler says so."""

import math
import os
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from pipelines.engine import cluster, say
from pipelines.preflight import check_cpus
from pipelines.runs import new_run_id
from pipelines.search_space import SearchConfig
from pipelines.training_config import TrainConfig
from pipelines.trials import Judge, Record, Stepper, progress, read_record, run_trial


def scheduler_of(search: SearchConfig, configs: dict[str, TrainConfig], records: dict[str, Record]) -> Any:
    """Return the Ray Tune scheduler of a search that knows what trials with a verdict have reported, by trial name."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if search.stop == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    scheduler = ASHAScheduler(
        time_attr="steps",
        metric=search.metric,
        mode=search.direction,
        max_t=max(config.recipe().stages[-1].num_steps for config in configs.values()),
        grace_period=search.grace_steps or min(config.checkpoint_every for config in configs.values()),
        reduction_factor=search.reduction_factor,
        stop_last_trials=False,  # they end by themselves, with a model
    )
    for name, record in records.items():
        if record.settled:
            judge = judge_of(scheduler, name)
            for report in record.reports:
                if (now := progress(configs[name], search.metric, report)) is not None:
                    judge(now)
    return scheduler


def judge_of(scheduler: Any, name: str) -> Judge:
    """Return the judge that a scheduler is to a trial which Ray Tune does not run."""
    trial = SimpleNamespace(trial_id=name)
    scheduler.on_trial_add(None, trial)
    return lambda now: bool(scheduler.on_trial_result(None, trial, now) != scheduler.STOP)


class _OfThisProcess:
    """A function that a pickle leaves behind: Ray Tune writes one of all that it is given."""

    def __init__(self, function: Callable[[], None] | None) -> None:
        self.function = function

    def __call__(self) -> None:
        assert self.function is not None
        self.function()

    def __reduce__(self) -> tuple[Any, ...]:
        return _OfThisProcess, (None,)


def run_on_tune(
    configs: dict[str, TrainConfig],
    search: SearchConfig,
    *,
    config: TrainConfig,
    scheduler: Any,
    parent_run: str,
    watch: Callable[[], None],
) -> None:
    """Run trials, each to its verdict, or to an exception after config.max_failures others. configs: by trial name.

    watch: called at each sign of life; what it raises ends the search. Ray Tune's own state goes into a temporary
    folder: a search continues by the records of its trials, and nothing here is unpickled. Raises ValueError for a
    cluster on which no trial fits.
    """
    here = _OfThisProcess(watch)
    os.environ |= {
        "RAY_AIR_NEW_OUTPUT": "0",  # which writes to stdout even at verbose=0
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search as if it were done
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last step of a trial has no metric
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    }
    together = min(search.max_concurrent, len(configs))
    with (
        tempfile.TemporaryDirectory(prefix="diffsr-") as folder,
        cluster(num_cpus=math.ceil(together * config.cpus_per_worker)),
    ):
        import ray
        from ray import tune

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        check_cpus(
            num_workers=1,
            cpus_per_worker=config.cpus_per_worker,
            num_data_workers=0,
            use_gpu=config.use_gpu,
            nodes=nodes,
            may_grow=config.wait_for_nodes,
        )

        class RayTrial(tune.Trainable):
            def setup(self, config: dict[str, Any], **shared: Any) -> None:
                os.environ["MLFLOW_TRACKING_URI"] = shared["tracking_uri"]
                mine, metric, parent = shared["configs"][config["trial"]], shared["metric"], shared["parent_run"]
                self.stepper = Stepper(lambda judge: run_trial(mine, metric, parent_run=parent, judge=judge))

            def step(self) -> dict[str, Any]:
                return self.stepper.step() or {"done": True}

            def cleanup(self) -> None:
                self.stepper.stop()

        class Watch(tune.Callback):
            def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                say(f"tune: trial {trial.config['trial']} begins")
                here()

            def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
                if search.metric in result:
                    name, value = trial.config["trial"], result[search.metric]
                    say(f"tune: trial {name} at step {result['steps']:.0f}: {search.metric} {value:.4f}")
                here()

            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                name = trial.config["trial"]
                say(f"tune: trial {name} is {read_record(configs[name].output).status}")

        shared = {
            "configs": configs,
            "metric": search.metric,
            "parent_run": parent_run,
            "tracking_uri": os.environ["MLFLOW_TRACKING_URI"],
        }
        resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {})
        tune.Tuner(
            tune.with_resources(tune.with_parameters(RayTrial, **shared), resources),
            param_space={"trial": tune.grid_search(list(configs))},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=search.max_concurrent),
            run_config=tune.RunConfig(
                name=new_run_id("tune"),
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=config.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[Watch()],
            ),
        ).fit()
