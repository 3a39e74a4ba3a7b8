"""A VAE's long call is computed part by part, with forward passes of others in between, and draws the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from sfumato.batching import interruption, offload, torch_state
from sfumato.batching.batcher import Batcher
from sfumato.batching.divided_attention import DividedAttention
from sfumato.batching.interruption import Slices
from sfumato.batching.task import State, Task
from sfumato.batching.verification import Verification
from sfumato.batching.views import view
from sfumato.core import Generation, Step
from sfumato.drawing import out_of_memory
from sfumato.engine.loop import Loop
from sfumato.engine.protocol import Answer, Report, Started, Stop, Submit
from sfumato.runners import module_state
from sfumato.settings import Settings
from support import here, tiny
from support.batches import noise
from support.drawing import loaded, wanted
from support.families import picture
from support.families_moving import wan

FORWARD = 12.0
"""Seconds of a forward pass of the denoiser on this file's clock. A layer of the VAE takes one."""

DENOISER, PART = "denoiser", "part"


class Stopped(BaseException):
    pass


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Trusting(Verification):
    """Without proofs, which compute other forward passes."""

    def decision(self, call: Any, signature: str) -> Any:
        return "yes"


class Timed:
    """A pipeline on a clock of its own, which its modules move on; what they compute, in order."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.now, self.part_s = 0.0, 1.0
        self.computed: list[str] = []
        denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        denoiser.register_forward_hook(lambda *_: self._compute(DENOISER, FORWARD))
        for part in pipe.vae.modules():
            if next(part.children(), None) is None:
                part.register_forward_hook(lambda *_: self._compute(PART, self.part_s))
        self.batcher = Batcher(verification=Trusting(), slices=Slices(lambda: self.now))

    def _compute(self, what: str, seconds: float) -> None:
        self.now += seconds
        self.computed.append(what)

    def submit(self, **call: Any) -> Task:
        return self.batcher.submit(lambda: self.draw(view(self.pipe), **call))

    def draw(self, pipe: Any, *, seed: int, **call: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return pipe(**call, generator=generator, output_type="pt").images

    def alone(self, **call: Any) -> Any:
        return self.draw(self.pipe, **call)

    def finish(self) -> None:
        while self.batcher.step():
            pass

    def parts_between(self) -> list[int]:
        """How many layers of the VAE were computed between two forward passes of the denoiser."""
        at = [index for index, what in enumerate(self.computed) if what == DENOISER]
        return [after - before - 1 for before, after in itertools.pairwise(at)]


@pytest.fixture
def timed() -> Timed:
    pipe = tiny.stable_diffusion()
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return Timed(pipe)


SMALL = {"prompt": "a cup", "width": 32, "height": 32, "num_inference_steps": 24}
LARGE = {"prompt": "a house", "width": 128, "height": 128, "num_inference_steps": 1}


def test_a_decode_delays_no_step_of_others_by_more_than_a_step(timed: Timed) -> None:
    """And its picture is the same, bit for bit, as alone."""
    alone = timed.alone(seed=1, **LARGE)
    timed.computed.clear()
    large = timed.submit(seed=1, **LARGE)
    others = [timed.submit(seed=seed, **SMALL) for seed in range(2, 5)]
    timed.finish()
    assert torch.equal(large.outcome.value, alone)  # type: ignore[union-attr]
    assert all(task.outcome and task.outcome.error is None for task in others)
    between = timed.parts_between()
    assert 0 < max(between) <= FORWARD
    assert sum(count > 0 for count in between) > 3  # it was interrupted several times


def test_a_short_call_ends_first_and_a_long_one_that_nobody_waits_for_is_only_heard(timed: Timed) -> None:
    """On the clock of this file: a forward pass of others of 1 s, layers of 1/64 s."""
    slices = Slices(lambda: timed.now)

    def parts(seconds: float, *, others: bool) -> int:
        slices.begin(others)
        for computed in itertools.count(1):
            timed.now += seconds
            if slices.over(on_host=True):
                return computed
        raise AssertionError

    timed.now += 1.0
    slices.forward(timed.now - 1.0)
    assert parts(1 / 64, others=True) == 48  # three quarters of it: another layer would not fit
    assert parts(1 / 64, others=False) == 64
    slices.forward(timed.now)  # the others' forward passes take no time
    assert parts(1 / 64, others=True) == 6  # a tenth of a second


def test_news_interrupts_a_long_call_beside_no_other(timed: Timed) -> None:
    """Beside others it does not: they have their turns, and the long call would get nowhere with much news."""
    slices = Slices(lambda: timed.now, news=lambda: True)
    for others in (False, True):
        slices.begin(others)
        assert slices.over(on_host=True) is not others


class Unready:
    """A runner that leaves every call to the module, as one does that has nothing prepared."""

    number = 0

    def prepare(self, method: str, args: Any, kwargs: Any, *, wait: bool = False) -> bool:
        return True

    def serves(self, method: str, args: Any, kwargs: Any) -> bool:
        return False

    def run(self, method: str, args: Any, kwargs: Any) -> Any:
        raise AssertionError("it does not serve this")


@pytest.mark.parametrize("decodes", [1, 2])
def test_what_a_runner_leaves_to_the_module_is_interrupted_too(timed: Timed, decodes: int) -> None:
    """One request's decode, and one that two share."""
    runners = {id(timed.pipe.vae): Unready()}

    def submit(**call: Any) -> Task:
        return timed.batcher.submit(lambda: timed.draw(view(timed.pipe, runners=runners), **call))

    large = [submit(seed=1, **LARGE) for _ in range(decodes)]
    others = [timed.submit(seed=seed, **SMALL) for seed in range(2, 5)]
    timed.finish()
    assert all(task.outcome and task.outcome.error is None for task in (*large, *others))
    assert 0 < max(timed.parts_between()) <= FORWARD


def test_after_a_layer_that_takes_longer_than_a_step_others_compute_as_long(timed: Timed) -> None:
    """A layer cannot be divided; but no step is delayed by two of them."""
    timed.part_s = 3 * FORWARD
    timed.submit(seed=1, **LARGE)
    timed.submit(seed=2, **SMALL)
    timed.finish()
    *between, _ = "".join("d" if what == DENOISER else "p" for what in timed.computed).strip("p").split("p")
    assert len(between) > 3
    assert {len(forwards) for forwards in between[1:]} == {3}


def test_an_attention_that_takes_longer_than_a_step_is_computed_in_parts(timed: Timed) -> None:
    """The one over the 64 x 64 latents of the VAE, on this file's clock: each query takes 10 ms."""
    latents = noise(1, 4, 64, 64)
    alone = timed.pipe.vae.decode(latents).sample
    original, queries = functional.scaled_dot_product_attention, []

    class OnTheClock(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is original and args[0].shape[-2] >= 768:
                queries.append(args[0].shape[-2])
                timed._compute(PART, 0.01 * args[0].shape[-2])
            return func(*args, **(kwargs or {}))

    timed.computed.clear()
    with OnTheClock():
        large = timed.batcher.submit(lambda: view(timed.pipe).vae.decode(latents).sample)
        others = [timed.submit(seed=seed, **SMALL) for seed in range(2, 5)]
        timed.finish()
    assert torch.equal(large.outcome.value, alone)  # type: ignore[union-attr]
    assert all(task.outcome and task.outcome.error is None for task in others)
    assert queries == [1024] * 4
    assert 0 < max(timed.parts_between()) <= FORWARD


def test_within_an_attention_others_compute_as_if_it_were_not(timed: Timed) -> None:
    """What divides it is away, and back when the call goes on, also after one that is cancelled there."""
    depths: list[int] = []

    def between() -> None:
        depths.append(torch_state.ambient()[3])
        assert torch.equal(functional.scaled_dot_product_attention(*few), expected_few)
        if len(depths) == 3:
            raise Stopped

    few, many = ([noise(1, 1, count, 8, seed=seed) for seed in range(3)] for count in (64, 4096))
    expected_few, expected = (functional.scaled_dot_product_attention(*each) for each in (few, many))
    outside = torch_state.ambient()
    divided = DividedAttention(lambda: depths.append(torch_state.ambient()[3]))
    with divided:
        assert torch.equal(functional.scaled_dot_product_attention(*many), expected)
        with divided.away():
            assert torch_state.ambient() == outside
    assert depths == [outside[3]] * 3
    depths.clear()
    with pytest.raises(Stopped), DividedAttention(between):
        functional.scaled_dot_product_attention(*many)
    assert torch_state.ambient() == outside


@pytest.mark.parametrize("given", [{"is_causal": True}, {"dropout_p": 0.5}, {"attn_mask": torch.zeros(4096, 4096)}])
def test_an_attention_whose_queries_are_not_alike_is_not_divided(given: dict[str, Any]) -> None:
    query, key, value = (noise(1, 1, 4096, 8, seed=seed) for seed in range(3))
    calls: list[None] = []
    with DividedAttention(lambda: calls.append(None)):
        functional.scaled_dot_product_attention(query, key, value, **given)
    assert not calls


def test_alone_it_is_interrupted_too_so_that_commands_are_read(timed: Timed) -> None:
    """Each turn of the batcher is one of the loop, which begins new requests and ends cancelled ones."""
    large = timed.submit(seed=1, **LARGE)
    while large.state is not State.INTERRUPTED:
        assert timed.batcher.step()
    before = timed.batcher.now
    timed.batcher.step()
    assert timed.batcher.now == before + 1  # the loop must not take it for idle
    late = timed.submit(seed=2, **SMALL)
    timed.batcher.step()
    assert late.state is State.PARKED
    timed.finish()
    assert torch.equal(large.outcome.value, timed.alone(seed=1, **LARGE))  # type: ignore[union-attr]


@pytest.fixture
def forwards() -> Iterator[list[Callable[[str], None]]]:
    """What is called with the class of each module, anywhere, that has computed."""
    called: list[Callable[[str], None]] = []

    def hook(module: torch.nn.Module, *_: Any) -> None:
        for each in called:
            each(type(module).__name__)

    handle = register_module_forward_hook(hook)
    yield called
    handle.remove()


@pytest.mark.parametrize("when", ["with their last step", "in its middle"])
def test_a_request_that_comes_when_all_others_are_decoded_does_not_wait_for_that(
    repositories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[Callable[[str], None]],
    when: str,
) -> None:
    """Two share the decode. No time passes for it, so nothing else than the new request interrupts it."""
    monkeypatch.setattr(interruption, "LISTEN_S", math.inf)
    monkeypatch.setattr(interruption, "SHORTEST_S", math.inf)
    seen: list[str] = []

    def submit(id: str) -> None:
        loop.post(Submit(config, here.asked(id=id, steps=1)))

    def send(report: Report) -> None:
        match report:
            case Answer("early" | "earlier", Step()):
                seen.append("stepped")
                if when == "with their last step" and seen == ["stepped", "stepped"]:
                    submit("late")
            case Started("late"):
                seen.append("late")

    def computed(name: str) -> None:
        if name == "UNetMidBlock2D" and when == "in its middle" and seen == ["stepped", "stepped"]:
            submit("late")
        elif name == "Decoder":
            seen.append("decoded")

    config = here.config(tmp_path, repositories["nitrosocke/Ghibli-Diffusion"])
    loop = Loop(Settings(device="cpu", data=tmp_path / "data", log_level="error"), send)
    forwards.append(computed)
    submit("earlier")
    submit("early")
    loop.post(Stop())
    loop.run()
    assert seen == ["stepped", "stepped", "late", "decoded", "decoded"]


def test_encoding_a_source_picture_is_interrupted_too(timed: Timed) -> None:
    timed.pipe = StableDiffusionImg2ImgPipeline.from_pipe(timed.pipe, safety_checker=None)
    timed.pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a hat", "image": picture(3, 128), "strength": 0.5, "num_inference_steps": 2}
    alone = timed.alone(seed=1, **call)
    timed.computed.clear()
    task = timed.submit(seed=1, **call)
    seen = set()
    while timed.batcher.step():
        seen |= {task.state} if DENOISER not in timed.computed else set()
    assert State.INTERRUPTED in seen
    assert torch.equal(task.outcome.value, alone)  # type: ignore[union-attr]


@pytest.mark.parametrize("state", [State.INTERRUPTED, State.BATCHED])
def test_decodes_that_share_a_forward_pass_are_interrupted_and_cancelled_one_by_one(timed: Timed, state: State) -> None:
    count = 1 if state is State.INTERRUPTED else 3
    alone = [timed.alone(seed=seed, **LARGE) for seed in range(count)]
    many = [timed.submit(seed=seed, **LARGE) for seed in range(count)]
    other = timed.submit(seed=9, **SMALL)
    timed.computed.clear()
    while many[0].state is not state:
        assert timed.batcher.step()
    assert {task.state for task in many} == {state}
    timed.batcher.cancel(many[0], Stopped())
    timed.finish()
    assert isinstance(many[0].outcome.error, Stopped)  # type: ignore[union-attr]
    for task, picture_alone in list(zip(many, alone, strict=True))[1:]:
        torch.testing.assert_close(task.outcome.value, picture_alone, rtol=0, atol=1e-5)  # type: ignore[union-attr]
    assert max(timed.parts_between()) <= FORWARD
    assert other.outcome
    assert not other.outcome.error


def test_nothing_of_it_is_computed_when_all_are_cancelled(timed: Timed) -> None:
    many = [timed.submit(seed=seed, **LARGE) for seed in range(2)]
    other = timed.submit(seed=9, **SMALL)
    while many[0].state is not State.BATCHED:
        assert timed.batcher.step()
    for task in many:
        timed.batcher.cancel(task, Stopped())
    timed.computed.clear()
    while timed.batcher.step():
        if len(timed.computed) >= 4:
            break
    assert set(timed.computed) == {DENOISER}
    timed.batcher.cancel(other, Stopped())
    assert not timed.batcher.step()
    assert not any(part._forward_pre_hooks for part in timed.pipe.vae.modules())


def test_a_shared_decode_that_runs_out_of_memory_is_halved(timed: Timed) -> None:
    """In its middle, after it has been interrupted."""
    alone = [timed.alone(seed=seed, **LARGE) for seed in range(4)]
    failing = timed.pipe.vae.decoder.conv_out

    def refuse(part: Any, arguments: Any) -> None:
        if len(arguments[0]) > 2:
            raise torch.OutOfMemoryError("no room")

    failing.register_forward_pre_hook(refuse)
    many = [timed.submit(seed=seed, **LARGE) for seed in range(4)]
    timed.finish()
    assert all(task.outcome for task in many)
    for task, picture_alone in zip(many, alone, strict=True):
        torch.testing.assert_close(task.outcome.value, picture_alone, rtol=0, atol=1e-5)  # type: ignore[union-attr]


def test_only_one_is_under_way_at_a_time(timed: Timed) -> None:
    """Its layers' results stay in memory meanwhile. Sizes differ, so that they share no forward pass."""
    many = [timed.submit(seed=size, **(LARGE | {"width": size})) for size in (96, 112, 128)]
    other = timed.submit(seed=9, **SMALL)
    most = 0
    while timed.batcher.step():
        most = max(most, sum(task.state is State.INTERRUPTED for task in many))
    assert most == 1
    assert other.outcome
    assert max(timed.parts_between()) <= FORWARD


def test_a_much_smaller_decode_goes_on_beside_it_in_turns(timed: Timed) -> None:
    """A picture does not wait for the decode of a clip; pixels are as alone."""
    calls = [LARGE, SMALL | {"num_inference_steps": 2}]
    alone = [timed.alone(seed=1, **call) for call in calls]
    tasks = [timed.submit(seed=1, **call) for call in calls]
    both = 0
    while timed.batcher.step():
        both += all(task.state is State.INTERRUPTED for task in tasks)
    assert both
    for task, picture_alone in zip(tasks, alone, strict=True):
        assert torch.equal(task.outcome.value, picture_alone)  # type: ignore[union-attr]


def test_weights_move_only_when_no_call_is_under_way(timed: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another request of the model runs out of memory while a decode is interrupted. `meta` stands for main memory."""
    model = loaded(timed.pipe, vae_tiling=False)
    large = timed.submit(seed=1, **LARGE)
    while large.state is not State.INTERRUPTED:
        timed.batcher.step()

    def attempt(generation: Generation) -> bool:
        if model.state.offload == "none":
            raise torch.OutOfMemoryError("no room")
        return large.done

    monkeypatch.setattr(offload, "enable", lambda pipe, device: pipe.vae.to("meta"))
    given = replace(model, device="cuda"), wanted(), attempt, lambda: 0, timed.batcher.let_long_calls_end
    short = [timed.batcher.submit(lambda: out_of_memory.with_less(*given)) for _ in range(2)]
    timed.finish()
    assert large.outcome
    assert large.outcome.error is None
    assert [task.outcome and task.outcome.value for task in short] == [True, True]
    assert model.state.offload == "model", "moved once for both"


def test_a_vae_in_tiles_is_interrupted_between_them_and_no_other_request_gets_tiles(timed: Timed) -> None:
    timed.pipe.vae.tile_latent_min_size = timed.pipe.vae.tile_sample_min_size // 8
    timed.pipe.vae.enable_tiling()
    tiled_alone = timed.alone(seed=1, **LARGE)
    timed.pipe.vae.disable_tiling()
    whole_alone = timed.alone(seed=1, **LARGE)
    tiled = timed.batcher.submit(lambda: timed.draw(view(timed.pipe, tiled=True), seed=1, **LARGE))
    whole = timed.submit(seed=1, **LARGE)
    other = timed.submit(seed=9, **SMALL)
    timed.computed.clear()
    timed.finish()
    assert (tiled_alone - whole_alone).abs().max() > 1e-3
    torch.testing.assert_close(tiled.outcome.value, tiled_alone, rtol=0, atol=1e-5)  # type: ignore[union-attr]
    torch.testing.assert_close(whole.outcome.value, whole_alone, rtol=0, atol=1e-5)  # type: ignore[union-attr]
    assert not timed.pipe.vae.use_tiling
    assert other.outcome
    assert max(timed.parts_between()) <= FORWARD


def test_a_vae_that_keeps_a_state_on_itself_may_be_called_in_between() -> None:
    """Wan's remembers the frames before on itself. Requests that never switch call it whenever they run."""
    vae = wan().vae.eval()
    first, second = (noise(1, 16, 3, 4, 4, seed=seed) for seed in range(2))
    alone = vae.decode(first).sample
    calls = 0

    def before_part(on_host: bool) -> None:
        nonlocal calls
        calls += 1
        if calls == parts // 2:
            vae.decode(second)

    parts = 10**9
    for _ in range(2):
        with interruption.part_by_part(vae, before_part) as own:
            drawn = own.decode(first).sample
        parts, calls = calls, 0
    assert torch.equal(drawn, alone)


class Counting(torch.nn.Module):
    """Keeps a state, as the convolutions of AutoencoderKLMagvit do."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.all = 0, [0]

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.last += 1
        self.all.append(self.last)
        return sample


def test_what_happens_within_a_call_is_of_layers_of_its_own() -> None:
    """A runner that is made of the module meanwhile finds no hooks; a state of layers is not another call's."""
    vae = tiny.stable_diffusion().vae.eval()
    vae.decoder.conv_act = counting = Counting().eval()
    latents = noise(1, 4, 4, 4)
    expected = vae.decode(latents).sample
    found: list[str] = []
    with interruption.part_by_part(vae, lambda on_host: found.append(module_state.why_hooked(vae))) as own:
        assert torch.equal(own.decode(latents).sample, expected)
        assert own.decoder.conv_act.last == 2
    assert found
    assert set(found) == {""}
    assert (counting.last, counting.all) == (1, [0, 1])
    assert [id(each) for each in own.parameters()] == [id(each) for each in vae.parameters()]


def with_accelerate_hook(vae: Any) -> None:
    vae.decoder.mid_block._hf_hook = object()


def compiled(vae: Any) -> None:
    vae.decoder.conv_in.compile(backend="eager")


def parametrized(vae: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(vae.decoder.conv_in)  # `copy.copy` raises for such a layer


@pytest.mark.parametrize("change", [with_accelerate_hook, compiled, parametrized])
def test_a_module_whose_weights_move_or_that_is_compiled_is_not_interrupted(change: Callable[[Any], None]) -> None:
    vae = tiny.stable_diffusion().vae
    assert interruption.interruptible(vae, "decode")
    assert not interruption.interruptible(vae, "forward")
    change(vae)
    assert not interruption.interruptible(vae, "decode")


def test_on_an_accelerator_it_is_interrupted_before_each_block() -> None:
    """The host's clock does not see the device's time. `meta` stands for a device that is not the host."""
    vae = tiny.stable_diffusion().vae.to("meta")
    seen: list[bool] = []
    with interruption.part_by_part(vae, seen.append) as own:
        own.decode(torch.zeros(1, 4, 8, 8, device="meta"))
    blocks = [*vae.decoder.up_blocks, *vae.decoder.mid_block.resnets, *vae.decoder.mid_block.attentions]
    assert seen == [False] * len(blocks)
    assert Slices(lambda: 0.0).over(on_host=False)
