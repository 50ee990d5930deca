"""Laws of the one-step distillation: closed forms of its three terms, who is trained, and that a student learns."""

from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from diffsr_core.distillation import Distillation, inverse_step, one_step, student_config, teacher_target
from diffsr_core.family import ModelConfig, Prediction, SuperResolver, Told, amplitudes
from diffsr_core.recipe import StageRecipe
from diffsr_core.sampler import last, sample
from diffsr_core.schedule import Schedule, sampling_grid
from tests.core.tiny import ANCHORED, DIFFUSIONS, RRDB_TWIN, SEED3, SR3, SRDIFF, model_of, pair

LEVEL = torch.full((2,), 0.5)  # what a distillation does not read
KINDS: tuple[Literal["x_0", "v"], ...] = ("x_0", "v")
STEPS = 120


def stage(**fields: object) -> StageRecipe:
    return StageRecipe(name="distillation", num_steps=1, learning_rate=1.0, **fields)  # type: ignore[arg-type]


def noise(model: SuperResolver, *, lr_size: tuple[int, int] = (8, 4), count: int = 2, seed: int = 1) -> Tensor:
    shape = model.diffused_shape(*lr_size)
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def couple(config: ModelConfig) -> tuple[SuperResolver, SuperResolver]:
    """A student with the weights of its teacher."""
    teacher, student = model_of(config), SuperResolver(student_config(config))
    student.load_state_dict(teacher.state_dict())
    return student, teacher


def one_step_sample(model: SuperResolver, x_T: Tensor, features: Tensor) -> Tensor:
    """What the ordinary sampler does in one step."""
    grid = sampling_grid(model.config.schedule, 1)
    return last(sample(model.denoise(features), grid, noise=lambda _: x_T, clip=model.config.residual_clip))


# --- f, g and the teacher's target ---


@pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)
@torch.no_grad()
def test_f_is_ddim_in_one_step_before_the_clip(config: ModelConfig) -> None:
    model = model_of(config).eval()
    _, lr = pair(config, lr_size=(8, 8))
    features, x_T = model.condition(lr).features, noise(model, lr_size=(8, 8))
    f = one_step(model, x_T, features)
    assert torch.equal(one_step_sample(model, x_T, features), f.clamp(-1, 1) if config.residual_clip else f)


@pytest.mark.parametrize("told", get_args(Told))
@pytest.mark.parametrize("kind", get_args(Prediction))
@torch.no_grad()
def test_g_is_the_raw_output_told_the_clean_end_and_is_the_noise_of_an_eps_or_v_network(
    kind: Prediction, told: Told
) -> None:
    model = model_of(replace(SR3, prediction=kind, told=told))
    _, lr = pair(SR3)
    features, x_0 = model.condition(lr).features, noise(model)
    assert model.denoiser is not None
    g = inverse_step(model, x_0, features)
    position = {"noise_level": 0.0, "amplitude": 1.0, "step": 0.0}[told]
    assert torch.equal(g, model.denoiser(x_0, torch.full((2,), position), features))
    if kind != "x_0":
        assert torch.equal(model.denoise(features)(x_0, 1.0)[1], g)


@pytest.mark.parametrize("clip", [True, False])
def test_the_target_is_the_teachers_own_sample_and_carries_no_gradient(clip: bool) -> None:
    teacher = model_of(replace(SRDIFF, residual_clip=clip))
    _, lr = pair(SRDIFF)
    features, x_T = teacher.condition(lr).features, noise(teacher)
    target = teacher_target(teacher, x_T, features, num_steps=4)
    x = x_T
    levels = [float(teacher.config.schedule.noise_levels[t]) for t in (99, 74, 49, 24)]
    for a, s in zip(levels, [*levels[1:], 1.0], strict=True):  # DDIM by hand
        x_0, eps = teacher.denoise(features)(x, a)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - a * x_0) / (1 - a * a) ** 0.5
        x = s * x_0 + (1 - s * s) ** 0.5 * eps
    assert not target.requires_grad and torch.allclose(target, x, rtol=1e-5, atol=1e-5)
    assert bool((target.abs() <= 1).all()) == clip


# --- the loss ---


class Known:
    """A student that says `far` at the noisiest level and `near` times what it is shown at level 1."""

    def __init__(self, *, far: float, near: float, kind: str) -> None:
        self.far, self.near = (torch.tensor(value, requires_grad=True) for value in (far, near))
        self.kind = kind

    def __call__(self, x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        if bool((noise_level == 1).all()):
            return self.near * x_t
        a, b = amplitudes(noise_level, x_t.dtype)
        x_0 = self.far * x_t
        return x_0 if self.kind == "x_0" else a * (x_t - a * x_0) / b - b * x_0


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_its_three_terms(kind: Prediction, clip: bool, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(ANCHORED, prediction=kind, residual_clip=clip)
    student, teacher = couple(config)
    distillation = Distillation(student, teacher, stage(loss=loss))
    hr, lr = pair(config)
    eps = noise(student)
    taught = torch.tanh(noise(student, seed=5))

    def predict(x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        a, b = amplitudes(noise_level, x_t.dtype)
        return taught if kind == "x_0" else a * (x_t - a * taught) / b - b * taught

    known = Known(far=0.3, near=-0.7, kind=kind)
    monkeypatch.setattr(teacher, "predict", predict)
    monkeypatch.setattr(student, "predict", known)
    x_0 = torch.nn.functional.pixel_unshuffle((hr - student.encoder(lr)[1]) * 10, 4).detach()
    x_0 = x_0.clamp(-1, 1) if clip else x_0

    def mean(difference: Tensor) -> Tensor:
        return (difference.abs() if loss == "l1" else difference.square()).mean()

    found = distillation(hr, lr, LEVEL, eps)
    far, near = (torch.tensor(value, requires_grad=True) for value in (0.3, -0.7))
    expected = mean(far * eps - taught) + mean(near * taught - eps) + mean(far * (near.detach() * x_0) - x_0)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    found.backward()
    expected.backward()  # type: ignore[no-untyped-call]
    for mine, its in ((known.far, far), (known.near, near)):  # the stop-gradient: g is not led by the third term
        assert mine.grad is not None and its.grad is not None
        assert float(mine.grad) == pytest.approx(float(its.grad), rel=1e-3)


def test_an_x_0_that_the_sampler_would_clip_still_has_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = couple(replace(SR3, prediction="x_0"))
    known = Known(far=50.0, near=0.0, kind="x_0")
    monkeypatch.setattr(student, "predict", known)
    hr, lr = pair(SR3)
    Distillation(student, teacher, stage(loss="l2"))(hr, lr, LEVEL, noise(student)).backward()
    assert known.far.grad is not None and float(known.far.grad) > 0


# --- who is trained ---


def reached(model: SuperResolver) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


@pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)
def test_the_gradient_reaches_every_parameter_of_the_students_denoiser_and_no_other(config: ModelConfig) -> None:
    student, teacher = couple(config)
    hr, lr = pair(config, lr_size=(8, 8))
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (student, teacher)]
    distillation = Distillation(student, teacher, stage(loss="l2")).train()
    distillation(hr, lr, LEVEL, noise(student, lr_size=(8, 8))).backward()
    denoiser = {n for n, _ in student.named_parameters() if n.startswith("denoiser.")}
    assert reached(student) == denoiser and not reached(teacher)
    assert {n for n, p in distillation.named_parameters() if p.requires_grad} == {f"model.{n}" for n in denoiser}
    assert not any(p.requires_grad for p in teacher.parameters())
    for model, values in zip((student, teacher), before, strict=True):  # running statistics too
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_the_teacher_is_not_in_the_module_that_is_wrapped() -> None:
    student, teacher = couple(SR3)
    distillation = Distillation(student, teacher, stage())
    assert distillation.model is student and distillation.stage.name == "distillation"
    assert list(distillation.state_dict()) == [f"model.{name}" for name in student.state_dict()]
    assert teacher not in list(distillation.modules())


def test_dropout_is_off_so_the_loss_is_a_function() -> None:
    config = replace(SR3, prediction="v", denoiser=replace(SR3.denoiser, dropout=0.5))  # type: ignore[type-var]
    student, teacher = couple(config)
    hr, lr = pair(config)
    distillation = Distillation(student, teacher, stage()).train()
    first, again = (distillation(hr, lr, LEVEL, noise(student)) for _ in range(2))
    assert torch.equal(first, again)


def test_autocast_gives_the_gradient_of_float32() -> None:
    gradients = []
    for enabled in (False, True):
        student, teacher = couple(SR3)
        hr, lr = pair(SR3)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            Distillation(student, teacher, stage(loss="l2"))(hr, lr, LEVEL, noise(student)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert gradients[0].shape == gradients[1].shape
    assert float(torch.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.99


# --- who fits whom ---


def test_only_what_is_told_predicted_projected_and_the_network_itself_may_differ() -> None:
    teacher = model_of(SR3)
    own = replace(SR3.denoiser, hidden=8)  # type: ignore[type-var]
    other = replace(SR3, told="step", prediction="v", consistency="low-band", denoiser=own)
    hr, lr = pair(SR3)
    student = model_of(other)
    assert bool(Distillation(student, teacher, stage())(hr, lr, LEVEL, noise(student)).isfinite())
    assert student_config(SR3) == replace(SR3, prediction="x_0", one_step=True)
    assert student_config(ANCHORED) == replace(ANCHORED, one_step=True)
    assert student_config(replace(ANCHORED, one_step=True, start_level=0.7)).start_level is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (RRDB_TWIN, SRDIFF, r"student must have a denoiser"),
        (replace(SRDIFF, prediction="v"), RRDB_TWIN, r"teacher must have a denoiser"),
        (SRDIFF, SRDIFF, r"prediction \(eps\) of the student must be v or x_0"),
        (replace(ANCHORED, residual_scale=5.0), ANCHORED, r"residual_scale \(5\.0\).*teacher's \(10\.0\)"),
        (replace(ANCHORED, anchor="bicubic"), ANCHORED, r"anchor \(bicubic\).*\(regression\)"),
        (replace(ANCHORED, residual_clip=True), ANCHORED, r"residual_clip \(True\)"),
        (replace(ANCHORED, schedule=Schedule(num_timesteps=50)), ANCHORED, r"schedule .*num_timesteps=50"),
        (replace(ANCHORED, encoder=SRDIFF.encoder), ANCHORED, r"encoder .*head='nearest'"),
        (replace(SR3, prediction="v"), SEED3, r"encoder "),
    ],
)
def test_models_that_do_not_diffuse_the_same_are_refused(
    student: ModelConfig, teacher: ModelConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(model_of(student), model_of(teacher), stage())


def test_an_encoder_with_other_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder \(.+\) of the student must be the teacher's; start from"):
        Distillation(model_of(ANCHORED, seed=1), model_of(ANCHORED, seed=2), stage())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weighting": "min_snr", "loss": "l2"}, r"weighting \(min_snr\) must be none"),
        ({"teacher_steps": 201}, r"steps \(201\) must be between 1 and 200"),
    ],
)
def test_a_stage_that_cannot_be_done_is_refused_at_once(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(*couple(SR3), stage(**fields))


# --- it learns ---


def two_colours(x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
    """The exact posterior mean of x_0 where each sample is one of two modes, -0.6 and 0.6, with a deviation of 0.2."""
    a, b = amplitudes(noise_level, x_t.dtype)
    variance = a * a * 0.04 + b * b
    mode = 0.6 * torch.tanh(a * 0.6 * x_t / variance)
    return mode + a * 0.04 / variance * (x_t - a * mode)


class PixelNet(torch.nn.Module):
    """A denoiser that sees each sample by itself, and the amplitude."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1)
        )

    def forward(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.stack([x_t, position[:, None, None, None].expand(x_t.shape)], dim=-1))[..., 0]
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_does_in_one_step_what_its_teacher_does_in_eight(
    kind: Literal["x_0", "v"], monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule(name="resshift", num_timesteps=15)
    config = replace(SR3, prediction=kind, residual_clip=False, schedule=schedule, told="amplitude")
    teacher = model_of(replace(config, prediction="x_0"))
    monkeypatch.setattr(teacher, "predict", two_colours)
    student = model_of(config)
    torch.manual_seed(0)
    student.denoiser = PixelNet()
    distillation = Distillation(student, teacher, stage(loss="l2", teacher_steps=8)).train()
    generator = torch.Generator().manual_seed(0)
    _, lr = pair(config, lr_size=(2, 2), count=4)
    features = student.condition(lr).features

    def error(model: SuperResolver) -> float:
        """Mean square between one step of this model and eight of the teacher, on noise that it was not trained on."""
        x_T = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(99))
        with torch.no_grad():
            wanted = teacher_target(teacher, x_T, features, num_steps=8)
            return float((one_step_sample(model, x_T, features) - wanted).square().mean())

    optimizer = torch.optim.Adam(student.denoiser.parameters(), lr=1e-2)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, 2 * (STEPS - step) / STEPS)
        x_T, z, side = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3))
        optimizer.zero_grad()
        distillation(0.6 * side.sign() + 0.2 * z, lr, LEVEL.repeat(2), x_T).backward()
        optimizer.step()
    undistilled = error(teacher)  # the mean of both modes, whatever the noise
    assert undistilled > 0.3
    assert error(student) < undistilled / 5
