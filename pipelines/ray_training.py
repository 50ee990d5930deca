"""Ray Train as the carrier of the training loop: workers, their company, and how their reports reach the driver."""

import logging
import math
import os
import threading
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from diffsr_core.training import DivergedError
from pipelines import storage
from pipelines.config import check
from pipelines.engine import cluster, say
from pipelines.feeding import feed_from_ray
from pipelines.loop import train_loop
from pipelines.preflight import bundle_cpus, check_cpus
from pipelines.reader import PairIndex
from pipelines.runs import TrainingFailed, new_run_id
from pipelines.training_config import TrainConfig
from pipelines.worker import LoopConfig, Report, Workers

_MOST_PER_CORE = 4


class Message(NamedTuple):
    """What a worker tells the driver: a report, a line for the person, or why a retry would gain nothing."""

    kind: Literal["report", "line", "failure"]
    content: Any


def run_on_ray(config: TrainConfig, loop: LoopConfig, index: PairIndex, report: Report) -> None:
    """Carry the loop to its end. Raises TrainingFailed, and what report raises; ValueError for too small a cluster."""
    wanted = {
        "num_workers": config.min_workers or config.num_workers,
        "cpus_per_worker": config.cpus_per_worker,
        "num_data_workers": config.data_workers,
    }
    bundle = bundle_cpus(config.cpus_per_worker, config.data_workers)
    num_cpus, cores = math.ceil(config.num_workers * bundle), len(os.sched_getaffinity(0))
    if not os.environ.get("RAY_ADDRESS"):  # a private Ray has as many logical CPUs as it is told
        check(num_cpus <= _MOST_PER_CORE * cores, "num_workers", config.num_workers,
              f"must leave at most {_MOST_PER_CORE} processes a core; they and their data workers are {num_cpus} on "
              f"{cores} cores", "use fewer, or a cluster")  # fmt: skip
    with cluster(num_cpus=num_cpus):
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        check_cpus(**wanted, use_gpu=config.use_gpu, nodes=nodes, may_grow=config.wait_for_nodes)  # type: ignore[arg-type]
        # Reports come to the driver through a queue: only it talks to MLflow, and it shows progress as it comes. It
        # stays beside the driver: on a node that is lost it would take the run along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        resources = {"CPU": bundle} | ({"GPU": 1.0} if config.use_gpu else {})
        elastic = config.min_workers is not None and config.min_workers < config.num_workers
        trainer = TorchTrainer(
            ray_loop,
            train_loop_config={
                "loop": loop,
                "messages": messages,
                "index": [ray.put(index)],  # in a list, or Ray would hand every worker the index itself
                "data_workers": config.data_workers,
            },
            scaling_config=ScalingConfig(
                num_workers=(config.min_workers, config.num_workers) if elastic else config.num_workers,  # type: ignore[arg-type]
                use_gpu=config.use_gpu,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=new_run_id("ray"),
                storage_path=_ray_storage(config.output),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            with Pump(messages, report):
                trainer.fit()
        except TrainingFailedError as error:
            raise TrainingFailed(f"{error}; the same command continues from the newest checkpoint") from error


def ray_loop(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs.

    A driver that wants no more of this run has closed the queue: a report then raises, and a restarted worker returns.
    What would fail again goes to the driver as a failure, and it closes the queue.
    """
    import ray.train
    import ray.train.torch
    import torch.distributed
    from ray.exceptions import RayActorError

    messages = arguments["messages"]
    try:
        messages.qsize()
    except RayActorError:
        return
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # which would repeat every report
    loop: LoopConfig = arguments["loop"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    def wrap(module: nn.Module) -> nn.Module:
        if world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)

    def report(metrics: dict[str, float]) -> None:
        if rank == 0:
            messages.put(Message("report", metrics))
        ray.train.report(metrics)  # its barrier takes 0.8 s; it also stops workers whose driver has died

    def summed(values: Tensor) -> Tensor:
        if world > 1:
            on_device = values.to(device)
            torch.distributed.all_reduce(on_device)
            values = on_device.cpu()
        return values

    workers = Workers(
        rank=rank,
        world=world,
        local_world=context.get_local_world_size(),
        device=str(device),
        report=report,
        tell=lambda line: messages.put(Message("line", line)),
        summed=summed,
        wrap=wrap,
    )
    feed = partial(feed_from_ray, index_ref=arguments["index"][0], num_data_workers=arguments["data_workers"])
    try:
        train_loop(loop, feed, workers)
    except DivergedError as error:
        messages.put(Message("failure", f"{error}, in another --output"))
        raise
    except (TrainingFailed, ValueError) as error:
        messages.put(Message("failure", str(error)))
        raise


class Pump(threading.Thread):
    """For the body of a with: hands what the workers put into a queue to `report` and to the person, in a thread.

    What report raises, and a failure of a worker, closes the queue (by which the workers know that they are to stop)
    and is raised at the end of the body, in place of what the body raised.
    """

    def __init__(self, messages: Any, report: Report) -> None:
        super().__init__(daemon=True)
        self.messages, self.report = messages, report
        self.error: BaseException | None = None

    def run(self) -> None:
        """Take messages until None comes."""
        import ray

        try:
            while (message := self.messages.get()) is not None:
                kind, content = message
                if kind == "failure":
                    raise TrainingFailed(content)
                (self.report if kind == "report" else say)(content)
        except BaseException as error:
            self.error = error
            ray.kill(self.messages.actor)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        from ray.exceptions import RayActorError

        with suppress(RayActorError):  # it is closed, or its machine is gone: the thread knows that too
            self.messages.put(None)
        self.join()
        if self.error is not None:
            raise self.error


def _ray_storage(output: str) -> str:
    uri = storage.join(output, "_diffsr", "ray")
    return uri if "://" in uri else storage.open_filesystem(uri)[1]
