"""Laws of the page that proves a GPU: it runs on a CPU, what is planted in it fails it, and no case loses another."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffsr_core import presets
from diffsr_core.family import SuperResolver
from diffsr_core.memory import plan_memory
from diffsr_core.noise import gaussian
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from tests.benchmarks import gpu_check, gpu_determinism, gpu_equality, gpu_memory, gpu_speed, training_gpu
from tests.benchmarks.gpu_cases import Case, Cells, Clock, Section, Verdict, outcome, picture, tf32


@pytest.fixture(autouse=True)
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two cases of each part."""
    monkeypatch.setattr(gpu_equality, "TINY", ("anchored",))
    monkeypatch.setattr(gpu_equality, "SAMPLERS", ("ddim", "langevin"))
    monkeypatch.setattr(gpu_determinism, "PRECISIONS", ("float32",))
    monkeypatch.setattr(gpu_memory, "RUNS", {"cpu": (("nano-x4", 1, "float32"),)})
    monkeypatch.setattr(gpu_speed, "ways", lambda device: [("eager", gpu_speed.KINDS[2], 2)])
    monkeypatch.setattr(gpu_speed, "STEPS", {"anchored-x4": 1})
    monkeypatch.setattr(training_gpu, "WARM_STEPS", 1)


def page_of(capsys: pytest.CaptureFixture[str], *sections: str, seconds: float = 3600.0) -> tuple[int, str]:
    """The exit code and the page of some sections on a CPU, which may be a busy one."""
    chosen = ["--sections", *sections] if sections else []
    code = gpu_check.main(["--device", "cpu", "--seconds", str(seconds), *chosen])
    return code, capsys.readouterr().out


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the table on top by check."""
    table = page.split("|---|---|---|---|\n")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line]
    assert all(len(row) == 4 for row in cells)
    return {row[0]: row[1:] for row in cells}


def test_a_cpu_runs_every_section_and_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    code, page = page_of(capsys)
    found = rows(page)
    assert code == 0, page
    assert {row[-1] for row in found.values()} == {"pass"}
    assert f"**PASS: {len(found)} of {len(found)}**" in page
    for part in ("noise", "resizing", "projection", "network", "image", "place in a call", "tile order", "memory"):
        assert any(check.startswith(part) for check in found), part
    for title, model in (("upscaling", "| anchored-x4 | 1 | bf16 | eager | 2 |"), ("training", "| nano-x4 | 2.0 M |")):
        assert model in page.split(f"## Speed of {title}")[1].split("\n## ")[0]


def test_a_network_that_sees_its_place_in_a_call_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Upscaler._predict

    def planted(self: Upscaler, batch: list[Tensor]) -> list[Tensor]:
        (out,) = predict(self, batch)
        return [out + torch.arange(len(out))[:, None, None, None]]

    monkeypatch.setattr(Upscaler, "_predict", planted)
    code, page = page_of(capsys, "determinism")
    verdicts = {check.partition(":")[0]: row[-1] for check, row in rows(page).items()}
    assert code == 1 and "**FAIL: " in page
    assert verdicts["place in a call"] == verdicts["tile order"] == "**FAIL**"
    assert verdicts["repeated"] == "pass"


def test_images_that_depend_on_what_ran_before_are_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = Upscaler._predict

    def planted(self: Upscaler, batch: list[Tensor]) -> list[Tensor]:
        (out,) = predict(self, batch)
        return [out + torch.randn(out.shape)]  # as of dropout that was left on

    monkeypatch.setattr(Upscaler, "_predict", planted)
    code, page = page_of(capsys, "determinism")
    assert code == 1
    assert {row[-1] for row in rows(page).values()} == {"**FAIL**"}


def test_one_unit_of_the_last_place_of_the_noise_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))

    def planted(*args: Any, **settings: Any) -> Tensor:
        field = gaussian(*args, **settings)
        if next(calls) == 1:
            field[0, 0, 0, 0] = torch.nextafter(field[0, 0, 0, 0], torch.tensor(9.0))
        return field

    monkeypatch.setattr(gpu_equality, "gaussian", planted)
    code, page = page_of(capsys, "equality")
    found = rows(page)
    assert code == 1
    assert found["noise"][0].startswith("1 of ") and found["noise"][0].endswith("by up to 1 ulp")
    assert [check for check, row in found.items() if row[-1] != "pass"] == ["noise"]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_plan_that_is_far_off_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def planted(*args: Any, **settings: Any) -> Any:
        plan = plan_memory(*args, **settings)
        return replace(plan, activations_bytes=round(plan.activations_bytes + (factor - 1) * plan.total_bytes))

    monkeypatch.setattr(gpu_memory, "plan_memory", planted)
    code, page = page_of(capsys, "memory")
    assert code == 1 and rows(page).popitem()[1][-1] == "**FAIL**"


def test_what_raises_is_a_failed_row_and_the_other_sections_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("out of memory | tried 2 GiB\nmore lines")

    monkeypatch.setattr(training_gpu, "timed", no_memory)
    code, page = page_of(capsys, "training", "memory", "beside")
    found = rows(page)
    assert code == 1
    assert found["training of nano-x4"] == [
        "raised OutOfMemoryError: out of memory / tried 2 GiB", "runs", "**FAIL**"
    ]  # fmt: skip
    assert [row[-1] for check, row in found.items() if check.startswith("memory")] == ["pass"]
    assert "| noise, 48 channels, 24 px |" in page


def test_without_time_nothing_runs_and_what_was_to_be_proved_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    code, page = page_of(capsys, seconds=0)
    verdicts = {check: row[-1] for check, row in rows(page).items()}
    assert code == 1 and all(row[0].startswith("not run") for row in rows(page).values())
    measured = {check for check, verdict in verdicts.items() if verdict == "-"}
    assert {check.split(" of ")[0] for check in measured} == {"beside the network", "yardsticks", "speed", "training"}
    assert {verdict for check, verdict in verdicts.items() if check not in measured} == {"**FAIL**"}


def test_a_case_that_may_take_longer_than_is_left_does_not_begin() -> None:
    ran: list[str] = []

    def case(name: str, takes_s: float) -> Case:
        def run() -> Sequence[Verdict]:
            ran.append(name)
            return [Verdict(name, "", "", True)]

        return Case(name, run, takes_s)

    clock = Clock(1000.0)
    given = [outcome(case(name, takes), clock, judged=True)[0] for name, takes in (("long", 1001.0), ("short", 1.0))]
    assert ran == ["short"] and [row.passed for row in given if isinstance(row, Verdict)] == [False, True]


def test_measured_rows_are_no_verdicts() -> None:
    section = Section("Speed", [Case("slow", lambda: [Cells(("slow", "0.0001"))])], ("what", "MP/s"))
    verdicts, (table,) = gpu_check.run([section], Clock(100.0))
    assert verdicts == [] and table.endswith("| what | MP/s |\n|---|---|\n| slow | 0.0001 |")


def test_the_limit_of_float32_lies_between_another_order_of_sums_and_tf32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 64, 16, 16, generator=generator), torch.randn(64, 64, 3, 3, generator=generator)
    order = torch.randperm(64, generator=generator)
    plain = nn.functional.conv2d(x, weight)

    def rounded(values: Tensor) -> Tensor:
        """To the 11 bits of TF32."""
        mantissa, exponent = torch.frexp(values)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    other_order = nn.functional.conv2d(x[:, order], weight[:, order])
    assert not torch.equal(plain, other_order)
    assert gpu_equality.float32_verdict("order", [plain], [other_order]).passed
    narrow = nn.functional.conv2d(rounded(x), rounded(weight))
    assert not gpu_equality.float32_verdict("TF32", [plain], [narrow]).passed
    assert not gpu_equality.float32_verdict("NaN", [plain], [plain * torch.nan]).passed


def test_bf16_may_be_twice_as_far_as_the_cpu_and_no_farther() -> None:
    plain = torch.full((4, 4), 10.0)
    for factor, good in ((1.9, True), (-1.9, True), (2.1, False)):
        found = [plain + factor * 0.1]
        assert gpu_equality.bf16_verdict("network", [plain], [plain + 0.1], found).passed is good
    white = picture(8, 8) // 2
    for levels, good in ((2, True), (3, False)):
        assert gpu_equality.ratio_verdict("image", white, white + 1, white + levels).passed is good


def test_float32_images_may_differ_by_one_level_in_few_samples() -> None:
    expected = picture(40, 50, 1) // 2
    for level, count, good in ((0, 0, True), (1, 10, True), (1, 11, False), (2, 1, False)):
        found = expected.copy()
        found.reshape(-1)[:count] += level
        assert gpu_equality.levels_verdict("image", expected, found).passed is good, (level, count)


def test_the_work_of_an_image_is_that_of_its_tiles() -> None:
    config = presets.get("anchored-x4").model
    recipe = SamplingRecipe(num_steps=3, tile=16, halo=4, window=16, margin=4)
    # All runs at LR resolution: each weight of a convolution is used once a pixel, of another layer once a tile.
    with torch.device("meta"):
        model = SuperResolver(config)
    costs = []
    for part in (model.encoder, model.denoiser):
        assert part is not None
        layers = [module for module in part.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        costs.append(sum(2 * x.weight.numel() * (256 if isinstance(x, nn.Conv2d) else 1) for x in layers))
    # Of 12 x 20 px two windows read all, the second as it is thin: two tiles of 16 px each.
    assert gpu_speed.flops_of(config, recipe, (12, 20)) == 4 * (costs[0] + 3 * costs[1])


def test_tf32_is_as_it_was_afterwards() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    for allowed in (True, False):
        with pytest.raises(RuntimeError), tf32(allowed):
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
            raise RuntimeError
        assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
