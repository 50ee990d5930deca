"""Laws of shared network calls: what a thread gets does not know who else asked, and nobody waits for ever."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsr_core.batching import Exchange, Member
from diffsr_core.family import ModelConfig
from diffsr_core.pixels import Pixels
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from tests.core.tiny import SR3, SRDIFF, model_of

SIZE = 4
PATIENCE_S = 30.0  # after which a thread counts as stuck


class Network:
    """x -> 2 x + level, told each call; slow by a random time, and broken where a tile says so."""

    def __init__(self, *, delay_s: float = 0.0, factor: float = 2.0) -> None:
        self.delay_s, self.factor = delay_s, factor
        self.calls: list[list[Tensor]] = []
        self.random = random.Random(3)
        self.running = 0

    def __call__(self, batch: list[Tensor]) -> list[Tensor]:
        self.running += 1
        assert self.running == 1  # one call at a time
        try:
            self.calls.append(batch)
            if self.delay_s:
                time.sleep(self.random.random() * self.delay_s)
            x, level = batch
            if (x == -1).any():
                raise ArithmeticError("a broken tile")
            if (x == -2).any():
                raise KeyboardInterrupt
            return [self.factor * x + level[:, None, None, None]]
        finally:
            self.running -= 1


def tile(value: float, level: float = 0.5) -> tuple[Tensor, Tensor]:
    return torch.full((1, 2, 2), value), torch.tensor(level)


def together(*functions: Callable[[], object]) -> None:
    """Run each in a thread of its own; raise what one raised, or AssertionError when one does not come back."""
    raised: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=[function], daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"
    for error in raised:
        raise error


def worker(
    exchange: Exchange, seed: int, *, rounds: int, most: int = 7, pause_s: float = 0.0, factor: float = 2.0
) -> Callable[[], None]:
    """A member that asks for some tiles of its own, again and again, and checks each answer."""

    def work() -> None:
        mine = random.Random(seed)
        with exchange.member() as member:
            for _ in range(rounds):
                values = [mine.random() for _ in range(mine.randint(0, most))]
                level = mine.random()
                found = exchange.ask(member, "network", [tile(value, level) for value in values])
                for value, (out,) in zip(values, found, strict=True):
                    assert torch.equal(out, factor * tile(value)[0] + torch.tensor(level))
                time.sleep(mine.random() * pause_s)

    return work


@pytest.mark.parametrize("num_members", [1, 2, 3, 5, 11])
def test_each_member_gets_its_own_answers_in_calls_of_one_size(num_members: int) -> None:
    network = Network(delay_s=0.002)
    exchange = Exchange({"network": network}, size=SIZE)
    together(*(worker(exchange, seed, rounds=12, pause_s=0.002) for seed in range(num_members)))
    assert all(len(x) == len(level) == SIZE for x, level in network.calls)
    assert exchange.num_calls == len(network.calls)
    asked = sum(1 for x, _ in network.calls for row in x if row.any())
    assert exchange.num_padded == SIZE * len(network.calls) - asked


def test_what_is_missing_in_a_call_is_zero_at_a_level_that_the_network_knows() -> None:
    network = Network()
    exchange = Exchange({"network": network}, size=SIZE)
    with exchange.member() as member:
        exchange.ask(member, "network", [tile(1.0, 0.25), tile(2.0, 0.75)])
    ((x, level),) = network.calls
    assert x[:, 0, 0, 0].tolist() == [1.0, 2.0, 0.0, 0.0] and level.tolist() == [0.25, 0.75, 0.25, 0.25]
    assert (exchange.num_calls, exchange.num_padded) == (1, 2)


@pytest.mark.parametrize("tiles_each", [1, 3, 4, 6, 7])
def test_with_as_many_members_as_places_no_call_is_padded_before_one_has_finished(tiles_each: int) -> None:
    # Whoever waits has a tile left: when all wait, there is a call's worth of them. Whose tiles are done waits no more.
    exchange = Exchange({"network": Network(delay_s=0.0005)}, size=SIZE)
    padded: list[int] = []

    def work() -> None:
        with exchange.member() as member:
            everybody.wait(PATIENCE_S)
            for _ in range(20):
                exchange.ask(member, "network", [tile(1.0)] * tiles_each)
            padded.append(exchange.num_padded)

    everybody = threading.Barrier(SIZE)
    together(*[work] * SIZE)
    assert padded[0] == 0
    assert exchange.num_calls < 20 * tiles_each + SIZE


def test_two_images_of_three_tiles_fill_calls_of_four() -> None:
    exchange = Exchange({"network": Network()}, size=SIZE)
    both = threading.Barrier(2)

    def work() -> None:
        with exchange.member() as member:
            both.wait(PATIENCE_S)
            for _ in range(40):
                exchange.ask(member, "network", [tile(1.0)] * 3)

    together(work, work)
    assert exchange.num_calls <= 2 * 40 * 3 / SIZE + 2  # and the last ones, that nobody is left to fill


def test_a_lone_member_of_many_tiles_pads_only_its_last_call() -> None:
    exchange = Exchange({"network": Network()}, size=SIZE)
    with exchange.member() as member:
        for count, calls in ((8, 2), (9, 3), (1, 1), (0, 0)):
            before = exchange.num_calls
            assert len(exchange.ask(member, "network", [tile(1.0)] * count)) == count
            assert exchange.num_calls - before == calls
    assert exchange.num_padded == 3 + 3


def test_tiles_at_different_noise_levels_share_a_call_and_keep_their_own() -> None:
    network = Network()
    exchange = Exchange({"network": network}, size=2)
    both = threading.Barrier(2)

    def work(level: float) -> None:
        with exchange.member() as member:
            both.wait(PATIENCE_S)
            ((out,),) = exchange.ask(member, "network", [tile(1.0, level)])
            assert torch.equal(out, torch.full((1, 2, 2), 2 + level))

    together(lambda: work(0.25), lambda: work(0.75))
    assert [sorted(level.tolist()) for _, level in network.calls] == [[0.25, 0.75]]


def test_several_networks_are_asked_at_once_and_never_in_one_call() -> None:
    networks = {"network": Network(delay_s=0.001), "other": Network(delay_s=0.001, factor=-3.0)}
    exchange = Exchange(networks, size=SIZE)

    def mixed() -> None:
        with exchange.member() as member:
            for k in range(20):
                ((out,),) = exchange.ask(member, "other", [tile(float(k))])
                assert torch.equal(out, torch.full((1, 2, 2), -3.0 * k + 0.5))
                ((out,),) = exchange.ask(member, "network", [tile(float(k))])
                assert torch.equal(out, torch.full((1, 2, 2), 2.0 * k + 0.5))

    together(mixed, mixed, mixed, worker(exchange, 1, rounds=20), worker(exchange, 2, rounds=20))
    assert networks["other"].calls and exchange.num_calls == sum(len(n.calls) for n in networks.values())


# --- nobody waits for ever ---


def test_members_that_come_leave_raise_and_ask_nothing_hold_nobody_up() -> None:
    exchange = Exchange({"network": Network(delay_s=0.001)}, size=SIZE)

    def idle() -> None:
        with exchange.member():
            time.sleep(0.05)

    def gives_up() -> None:
        for _ in range(5):
            with pytest.raises(LookupError), exchange.member() as member:
                exchange.ask(member, "network", [tile(1.0)])
                raise LookupError

    def comes_and_goes() -> None:
        for seed in range(10):
            worker(exchange, seed, rounds=2, pause_s=0.002)()

    together(idle, gives_up, comes_and_goes, comes_and_goes, *(worker(exchange, k, rounds=15) for k in range(3)), idle)
    worker(exchange, 9, rounds=3)()  # and nothing is left behind


@pytest.mark.parametrize("seed", range(4))
def test_broken_calls_hold_nobody_up(seed: int) -> None:
    exchange = Exchange({"network": Network(delay_s=0.0005)}, size=SIZE)
    failed = []

    def work(own: int) -> None:
        mine = random.Random(100 * seed + own)
        with exchange.member() as member:
            for _ in range(25):
                broken = mine.random() < 0.1
                try:
                    exchange.ask(member, "network", [tile(-1.0 if broken else 1.0)] * mine.randint(1, 6))
                    assert not broken
                except ArithmeticError:
                    failed.append(own)

    together(*(lambda own=own: work(own) for own in range(5)))
    assert failed


def in_one_call(
    exchange: Exchange, values: tuple[float, float]
) -> tuple[list[BaseException | None], list[BaseException]]:
    """What two members get whose two tiles each fill one call."""
    both, got = threading.Barrier(2), list[BaseException | None]([None, None])

    def work(index: int) -> None:
        with exchange.member() as member:
            both.wait(PATIENCE_S)
            try:
                exchange.ask(member, "network", [tile(values[index])] * 2)
            except BaseException as error:
                got[index] = error

    together(lambda: work(0), lambda: work(1))
    return got, [error for error in got if error is not None]


def test_what_a_call_raises_reaches_everybody_in_it_and_nobody_else() -> None:
    exchange = Exchange({"network": Network()}, size=SIZE)
    got, _ = in_one_call(exchange, (1.0, -1.0))
    assert got[0] is got[1] and isinstance(got[0], ArithmeticError)
    assert in_one_call(exchange, (1.0, 3.0)) == ([None, None], [])
    with exchange.member() as member, pytest.raises(ArithmeticError, match="a broken tile"):
        exchange.ask(member, "network", [tile(1.0)] * 5 + [tile(-1.0)])  # in the second call


def test_an_interrupt_ends_its_own_thread_and_is_an_error_in_the_others() -> None:
    exchange = Exchange({"network": Network()}, size=SIZE)
    _, errors = in_one_call(exchange, (1.0, -2.0))
    assert sorted(type(error).__name__ for error in errors) == ["KeyboardInterrupt", "RuntimeError"]
    assert in_one_call(exchange, (1.0, 3.0)) == ([None, None], [])


# --- seconds ---


def test_the_seconds_of_a_call_are_shared_out_by_tiles_and_add_up() -> None:
    def slow(batch: list[Tensor]) -> list[Tensor]:
        time.sleep(0.02)
        return [batch[0]]

    exchange = Exchange({"network": slow}, size=SIZE)
    both, members = threading.Barrier(2), dict[int, Member]()

    def work(count: int) -> None:
        with exchange.member() as member:
            members[count] = member
            both.wait(PATIENCE_S)
            for _ in range(3):
                exchange.ask(member, "network", [tile(1.0)] * count)
                both.wait(PATIENCE_S)

    started = time.perf_counter()
    together(lambda: work(1), lambda: work(3))
    elapsed = time.perf_counter() - started
    assert members[3].seconds == pytest.approx(3 * members[1].seconds, rel=1e-9)
    assert exchange.num_calls == 3
    assert 3 * 0.02 <= members[1].seconds + members[3].seconds <= elapsed
    with exchange.member() as alone:  # whom the padding is charged to
        exchange.ask(alone, "network", [tile(1.0)])
    assert alone.seconds >= 0.02


# --- the law on real networks ---


def pictures() -> Iterator[Pixels]:
    sizes = [(8, 8, 3), (1, 1, 3), (9, 17, 3), (9, 5, 1), (11, 8, 3), (8, 13, 3), (6, 6, 3)]
    for seed, (height, width, channels) in enumerate(sizes):
        yield np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("config", [SRDIFF, SR3], ids=["srdiff", "sr3 with attention"])
def test_the_bytes_of_an_image_are_those_it_has_alone_whatever_is_in_flight(
    config: ModelConfig, precision: str
) -> None:
    recipe = SamplingRecipe(sampler="ddpm", num_steps=2, tile=8, halo=2, micro_batch=4, window=16, margin=4)
    recipe = replace(recipe, precision=precision)  # type: ignore[arg-type]
    model, images = model_of(config), list(pictures())
    alone = [Upscaler(model, recipe)(image, digest=str(index)).sr.tobytes() for index, image in enumerate(images)]
    assert len(set(alone)) == len(images)
    shared = Upscaler(model, recipe, in_flight=2)
    for count in (1, 2, 4, 7):
        left = random.Random(count).sample(range(len(images)), len(images))
        found: dict[int, bytes] = {}

        def work(left: list[int] = left, found: dict[int, bytes] = found) -> None:
            while True:
                try:
                    index = left.pop()
                except IndexError:
                    return
                found[index] = shared(images[index], digest=str(index)).sr.tobytes()

        together(*[work] * count)
        assert [found[index] for index in range(len(images))] == alone


def test_lanes_run_calls_side_by_side_and_give_each_tile_its_own() -> None:
    gate = threading.Barrier(3)  # passed only when three calls run at once

    def network(batch: list[Tensor]) -> list[Tensor]:
        gate.wait(PATIENCE_S)
        return [2 * batch[0]]

    exchange = Exchange({"network": network}, size=2, lanes=3)
    with exchange.member() as member:
        found = exchange.ask(member, "network", [tile(float(index)) for index in range(1, 13)])
    assert [float(out[0, 0, 0]) for (out,) in found] == [2.0 * index for index in range(1, 13)]
    assert (exchange.num_calls, exchange.num_padded) == (6, 0)


def test_what_a_call_beside_raises_reaches_who_asked_and_the_next_call_works() -> None:
    def network(batch: list[Tensor]) -> list[Tensor]:
        if (batch[0] == -1).any():
            raise ArithmeticError("a broken tile")
        return [batch[0]]

    exchange = Exchange({"network": network}, size=1, lanes=2)
    with exchange.member() as member:
        with pytest.raises(ArithmeticError, match="a broken tile"):
            exchange.ask(member, "network", [tile(1.0), tile(-1.0), tile(2.0)])
        assert len(exchange.ask(member, "network", [tile(3.0)] * 5)) == 5


@pytest.mark.parametrize("num_threads", [1, 2])
def test_lanes_have_the_threads_of_the_recipe_and_change_no_byte(num_threads: int) -> None:
    recipe = SamplingRecipe(num_steps=2, tile=16, halo=4, micro_batch=2, num_threads=num_threads)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    seen: set[int] = set()
    images = []
    for lanes in (1, 3):
        upscaler = Upscaler(model_of(SRDIFF), recipe, lanes=lanes)
        asked = upscaler.exchange._networks["denoise"]

        def watched(batch: list[Tensor], asked: Callable[[list[Tensor]], list[Tensor]] = asked) -> list[Tensor]:
            seen.add(torch.get_num_threads())
            return asked(batch)

        upscaler.exchange._networks = {**upscaler.exchange._networks, "denoise": watched}
        images.append(upscaler(pixels, digest="a").sr.tobytes())
    assert images[0] == images[1] and seen == {num_threads}
