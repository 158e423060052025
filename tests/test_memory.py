"""Plans of memory: what they choose, what they refuse, and that what is carried out changes no pixel."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import CpuOffload
from PIL import Image

from kairos import memory, placement, presets, sizes
from kairos.cli import batch, main, run
from kairos.cli.jobs import Job
from kairos.data.media import read_video
from kairos.errors import UserError
from kairos.memory import FREED, RESIDENT, STREAMED, WHOLE, Clip, Model, clip_of
from kairos.model_info import for_planning, info
from kairos.models import vae
from kairos.placement import in_four_bits, place, quantize, stream
from kairos.request import Request

CLIP = Clip(480, 640, 81, 4, guided=False)
SHORT = replace(CLIP, num_frames=21)


@pytest.fixture
def released() -> Model:
    return for_planning(info("kairos-4b-480p"), "cuda")


def places(plan: memory.Plan) -> list[str]:
    return [part.place for part in plan.parts]


def test_less_memory_means_offloading_then_streaming_then_tiles(released) -> None:
    assert places(memory.plan(released, CLIP, 80)) == [RESIDENT] * 3
    assert WHOLE in places(memory.plan(released, CLIP, 24)) or STREAMED in places(
        memory.plan(released, CLIP, 24)
    )
    small = memory.plan(released, SHORT, 5)
    assert places(small) == [STREAMED, STREAMED, RESIDENT] and small.tiled
    assert not memory.plan(released, CLIP, 24).tiled


FITTING = [*((SHORT, gb) for gb in (5, 6, 8, 10)), *((CLIP, gb) for gb in (12, 14, 20, 24, 32, 80))]


@pytest.mark.parametrize(("clip", "budget"), FITTING)
def test_a_plan_keeps_within_its_memory_and_more_memory_is_never_slower(released, clip, budget) -> None:
    plan = memory.plan(released, clip, budget)
    assert plan.peak_gb <= budget
    assert memory.plan(released, clip, budget * 2).seconds <= plan.seconds


@pytest.mark.parametrize(
    ("height", "width", "step_s", "activations_gb"), [(480, 640, 0.768, 9.2), (704, 1280, 3.03, 26.7)]
)
def test_a_plan_says_what_an_h200_measured(released, height, width, step_s, activations_gb) -> None:
    """benchmarks/results/gpu-h200.json: one step, and the peak less the 8.1 GB of the weights."""
    clip = replace(CLIP, height=height, width=width, steps=1)
    denoise = memory.plan(released, clip, 140).stages[1]
    assert denoise.name == "denoise"
    assert denoise.seconds == pytest.approx(step_s, rel=0.05)
    assert denoise.activations_gb == pytest.approx(activations_gb, rel=0.05)


def test_guidance_and_tiles_take_time_and_memory_of_their_own(released) -> None:
    def stages(guided=False, **options) -> tuple[memory.Stage, ...]:
        return memory.plan(released, replace(CLIP, guided=guided), 140, **options).stages

    (_, plain, whole), (_, guided, _), (_, _, tiled) = stages(), stages(guided=True), stages(tiled=True)
    assert guided.seconds == 2 * plain.seconds and guided.activations_gb > plain.activations_gb
    assert tiled.seconds > whole.seconds


def test_a_plan_is_for_the_clip_as_the_pipeline_will_make_it() -> None:
    defaults = info("kairos-4b-480p").defaults
    asked = Request("a ball", height=33, width=47, num_frames=9, num_inference_steps=7, guidance_scale=1.0)
    assert clip_of(defaults, "flow_match") == Clip(480, 640, 81, 50, guided=True)
    assert clip_of(defaults, "flow_match", asked) == Clip(48, 48, 9, 7, guided=False)
    assert clip_of(defaults, "few_step") == Clip(480, 640, 81, 4, guided=False)


def test_in_a_rollout_no_part_is_ever_away_as_a_whole(released) -> None:
    for clip, budget in FITTING:
        rolled = memory.plan(released, replace(clip, rolling=True), budget)
        assert WHOLE not in places(rolled) and rolled.peak_gb <= budget
    tiny = for_planning(info("kairos-tiny"), "cpu")
    rolled = memory.plan(tiny, replace(CLIP, height=64, width=64, rolling=True), 8, device="cpu")
    assert places(rolled) == [RESIDENT] * 3


def test_what_decodes_chunk_by_chunk_is_never_planned_in_tiles(released) -> None:
    in_tiles = memory.plan(released, replace(SHORT, rolling=True), 5)
    assert in_tiles.tiled
    untileable = replace(SHORT, rolling=True, tileable=False)
    with pytest.raises(UserError, match="do not fit in 5 GB") as error:
        memory.plan(released, untileable, 5)
    enough = float(str(error.value).rsplit(" GB", 1)[0].split()[-1])
    whole = memory.plan(released, untileable, enough)
    assert not whole.tiled and 5 < whole.peak_gb <= enough


def test_videos_made_at_once_take_their_memory_and_time_each(released) -> None:
    one, four = (memory.plan(released, replace(SHORT, videos=count), 140) for count in (1, 4))
    assert [stage.name for stage in four.stages] == ["encode prompt", "denoise", "decode frames"]
    for alone, together in zip(one.stages[1:], four.stages[1:], strict=True):
        assert together.activations_gb == pytest.approx(4 * alone.activations_gb)
        assert together.seconds == pytest.approx(4 * alone.seconds)


def test_what_cannot_fit_is_refused_with_what_would(released) -> None:
    with pytest.raises(UserError, match=r"do not fit in 4.5 GB: the least is .* what would fit: .*frames"):
        memory.plan(released, CLIP, 4.5)
    with pytest.raises(UserError, match="a device with more memory"):
        memory.plan(released, CLIP, 0.5)
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="above 0 GB"):
            memory.plan(released, CLIP, wrong)


def test_too_many_videos_at_once_hear_how_many_would_fit(released) -> None:
    many = replace(SHORT, rolling=True, videos=64)
    with pytest.raises(UserError, match=r"would fit: .*\d at once") as error:
        memory.plan(released, many, 24)
    count = int(str(error.value).split(" at once")[0].split()[-1])
    assert 1 < count < 64
    assert memory.plan(released, replace(many, videos=count), 24).peak_gb <= 24
    with pytest.raises(UserError):
        memory.plan(released, replace(many, videos=count + 1), 24)


def test_the_suggestions_fit(released) -> None:
    with pytest.raises(UserError) as error:
        memory.plan(released, CLIP, 4.6)
    frames = int(str(error.value).split(" frames or")[0].split()[-1])
    assert memory.plan(released, replace(CLIP, num_frames=frames), 4.6).peak_gb <= 4.6


def test_the_longest_length_that_fits_is_found_at_once_however_long_the_video(released) -> None:
    with pytest.raises(UserError) as error:
        memory.plan(released, replace(CLIP, num_frames=100_001), 24)
    frames = int(str(error.value).split(" frames or")[0].split()[-1])
    assert memory.plan(released, replace(CLIP, num_frames=frames), 24).peak_gb <= 24
    with pytest.raises(UserError):
        memory.plan(released, replace(CLIP, num_frames=frames + 4), 24)


@pytest.mark.parametrize("dilation", [1, 4])
def test_the_frames_that_windows_hold_are_counted(dilation) -> None:
    for frames in (1, 2, 7, 21):
        pairs = [(a, b) for a in range(frames) for b in range(frames) if (a - b) % dilation == 0]
        steps = [abs(a - b) // dilation for a, b in pairs]
        held = sum(1.0 if step < 3 else 0.5 for step in steps if step <= 3)
        assert sizes.mean_seen_frames(frames, 3, dilation) == pytest.approx(held / frames)


def test_a_plan_for_several_videos_fits_each_of_them(released) -> None:
    clips = [replace(CLIP, steps=50, guided=True), replace(CLIP, num_frames=161, steps=50, guided=True)]
    # By itself the shorter may keep all parts resident, and its peak is then above the longer's.
    alone = [memory.plan(released, clip, 40) for clip in clips]
    assert places(alone[0]) == [RESIDENT] * 3 and alone[0].peak_gb > alone[1].peak_gb
    both = memory.plan(released, clips, 40)
    assert places(both) == places(alone[1]) and both.peak_gb == alone[1].peak_gb <= 40
    assert memory.plan(released, clips[::-1], 40) == both
    with pytest.raises(UserError, match="161 frames of 480 x 640 do not fit"):
        memory.plan(released, clips, 12)


def test_the_memory_that_is_suggested_is_enough(released) -> None:
    with pytest.raises(UserError, match="frames or") as error:
        memory.plan(released, CLIP, 10)
    enough = float(str(error.value).split(" or ")[-1].removesuffix(" GB"))
    assert memory.plan(released, CLIP, enough).peak_gb <= enough


def test_eight_bits_halve_the_weights_of_bfloat16(released) -> None:
    whole, halved = (memory.plan(released, CLIP, 80, quantize=kind) for kind in (None, "int8"))
    assert 0.5 < halved.parts[1].gb / whole.parts[1].gb < 0.55
    assert halved.parts[2] == whole.parts[2]


def test_four_bits_take_a_quarter_of_the_encoder_and_are_never_streamed(released) -> None:
    eight, four = (memory.plan(released, CLIP, 80, quantize=kind) for kind in ("int8", "int4"))
    assert 0.5 < four.parts[0].gb / eight.parts[0].gb < 0.6
    assert four.parts[1] == eight.parts[1]
    for clip, budget in ((SHORT, 10), (SHORT, 14), (CLIP, 15), (CLIP, 20)):
        assert places(memory.plan(released, clip, budget, quantize="int4"))[0] in (RESIDENT, WHOLE)


def test_small_frames_are_decoded_together_and_so_counted() -> None:
    assert sizes.LATENTS_TOGETHER == vae.AT_ONCE
    tiny = for_planning(info("kairos-tiny"), "cpu")

    def working(frames: int, side: int) -> float:
        """Without the video itself, which is there twice in float32."""
        plan = memory.plan(tiny, Clip(side, side, frames, 4, guided=False), 64, device="cpu")
        return plan.stages[-1].activations_gb - 2 * 3 * frames * side * side * 4 / 1e9

    maps = 8 * 64 * 64 * 16 * 4 / 1e9  # of one frame: eight of the decoder's sixteen channels in float32
    assert working(17, 64) - working(5, 64) == pytest.approx(11 * maps, rel=0.2)
    assert working(33, 64) == pytest.approx(working(17, 64))
    assert working(33, 256) == pytest.approx(working(5, 256))


def test_on_a_cpu_weights_go_to_bfloat16_only_where_float32_is_too_much() -> None:
    model = for_planning(info("kairos-tiny"), "cpu")
    clip = Clip(64, 64, 33, 20, guided=True)
    roomy = memory.plan(model, clip, 8, device="cpu")
    tight = memory.plan(model, clip, roomy.peak_gb - 1e-3, device="cpu")
    assert (roomy.dtype, tight.dtype) == ("float32", "bfloat16")


def test_a_device_a_precision_and_a_list_of_clips_that_are_none_are_refused_in_one_line(released) -> None:
    clip = Clip(480, 640, 81, 4, guided=False)
    for device in ("mps", torch.device("cuda")):
        with pytest.raises(UserError, match='device must be "cuda" or "cpu", got '):
            memory.plan(released, clip, 24, device=device)
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, float16, got 'nonsense'"):
        for_planning(info("kairos-4b-480p"), "cuda", dtype="nonsense")
    with pytest.raises(UserError, match="nothing to plan for: give one clip or several"):
        memory.plan(released, [], 24)


def kairos(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


def test_the_command_prints_the_plan_and_refuses_with_status_2(capsys) -> None:
    size = ("plan", "--model", "kairos-4b-480p", "--frames", "81", "--height", "480", "--width", "640")
    assert kairos(*size, "--gpu-memory", "24", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["peak_gb"] <= 24 and len(said["parts"]) == len(said["stages"]) == 3
    assert kairos(*size, "--gpu-memory", "24") == 0
    assert "computed and not measured" in capsys.readouterr().out
    assert kairos(*size, "--gpu-memory", "2") == 2
    assert "do not fit in 2 GB" in capsys.readouterr().err
    for wrong in ((), ("--gpu-memory", "8", "--cpu-memory", "8"), ("--gpu-memory", "8", "--quantize", "x")):
        assert kairos(*size, *wrong) == 2
    assert kairos(*size, "--cpu-memory", "80", "--peak", "100") == 2
    assert "--peak is the GPU's" in capsys.readouterr().err
    for option, wrong, message in (("--frames", "80", "try 81 or 77"), ("--steps", "0", "at least 1, got 0")):
        assert kairos("plan", option, wrong, "--gpu-memory", "24") == 2
        assert message in capsys.readouterr().err
    assert kairos("generate", "x", "--memory", "much") == 2
    assert "auto or a number of GB" in capsys.readouterr().err


def test_a_rollout_keeps_to_a_plan_too(tmp_path, capsys, caplog) -> None:
    common = ("rollout", "a red ball rolls", "--seconds", "0.5", "--steps", "2", "--model", "kairos-tiny")
    assert kairos(*common, "-o", str(tmp_path / "plain.mp4")) == 0
    assert kairos(*common, "-o", str(tmp_path / "planned.mp4"), "--memory", "8") == 0
    assert any("of 8 GB at the peak" in record.getMessage() for record in caplog.records)
    plain, planned = (read_video(tmp_path / f"{name}.mp4") for name in ("plain", "planned"))
    assert (plain == planned).all()
    assert kairos(*common, "-o", str(tmp_path / "small.mp4"), "--memory", "0.1") == 2
    assert "do not fit in 0.1 GB" in capsys.readouterr().err
    assert not (tmp_path / "small.mp4").exists()


def test_on_a_cpu_a_list_is_planned_with_the_encoder_that_it_keeps(tmp_path, monkeypatch) -> None:
    plans = []

    def load(options, device, dtype, plan):
        plans.append(plan)
        raise UserError("enough is known")

    monkeypatch.setattr(run, "load", load)
    for count in (1, 2):
        requests = [{"prompt": "a ball", "seed": seed} for seed in range(count)]
        (tmp_path / "list.json").write_text(json.dumps(requests))
        file, folder = str(tmp_path / "list.json"), str(tmp_path / "out") + "/"
        assert kairos("generate", "--request", file, "-o", folder, "--device", "cpu", "--memory", "8") == 2
    alone, listed = plans
    assert (places(alone)[0], places(listed)[0]) == (FREED, RESIDENT)
    assert listed.stages[-1].peak_gb > alone.stages[-1].peak_gb
    job = Job(Request(prompt="a ball"), tmp_path / "out.mp4")
    refused = Job(Request(input_video="start.mp4", input_frames=33), tmp_path / "refused.mp4")
    worker = batch._planned([job, refused], run.RunOptions(device="cpu", memory="8"))
    assert worker is not None and places(worker)[0] == RESIDENT


def frames(pipeline, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a ball", generator=generator, output_type="pt", **options).frames


def test_streaming_block_by_block_changes_no_bit(pipeline) -> None:
    resident = frames(pipeline)
    stream(pipeline.transformer, torch.device("cpu"), by_blocks=True)
    stream(pipeline.text_encoder, torch.device("cpu"), by_blocks=False)
    assert torch.equal(frames(pipeline), resident)


def test_a_plan_is_carried_out(pipeline, released) -> None:
    resident = frames(pipeline)
    plan = memory.plan(released, SHORT, 5)
    assert torch.equal(frames(place(pipeline, plan, torch.device("cpu"))), resident)
    assert any(hasattr(block, "_diffusers_hook") for block in pipeline.transformer.blocks)


def test_blocks_that_are_streamed_to_a_gpu_are_pinned_once_and_before_they_work(
    pipeline, monkeypatch
) -> None:
    waiting, pinned = SimpleNamespace(synchronize=lambda: None), []
    monkeypatch.setattr(torch.cuda, "Stream", lambda: waiting)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: waiting)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor)
    stream(pipeline.text_encoder.model, torch.device("cuda"), by_blocks=False)
    assert not pinned
    stream(pipeline.transformer, torch.device("cuda"), by_blocks=True)
    assert {weight.data_ptr() for weight in pipeline.transformer.blocks.parameters()} <= set(pinned)


def test_the_clock_waits_for_the_gpu_that_parts_are_offloaded_from(pipeline, released, monkeypatch) -> None:
    plan = memory.plan(released, CLIP, 80)
    plan = replace(plan, parts=tuple(replace(part, place=WHOLE) for part in plan.parts))
    place(pipeline, plan, torch.device("cuda"))
    assert pipeline.device.type == "cpu"
    waited, watched = [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device.type))
    run._watch(SimpleNamespace(watch=lambda module, name, wait: watched.append(wait())), pipeline)
    assert waited == ["cuda"] * len(watched) and len(watched) == 4


@pytest.mark.parametrize("given", ["image", "video"])
def test_parts_that_are_offloaded_whole_work_alone_whatever_is_given(
    pipeline, released, monkeypatch, given
) -> None:
    """On a CPU nothing moves: the hook notes where its module would be."""
    there, seen = set(), []

    class Noting(CpuOffload):
        def pre_forward(self, module, *args, **kwargs):
            if self.prev_module_hook is not None:
                self.prev_module_hook.offload()
            there.add(type(module))
            seen.append(set(there))
            return args, kwargs

        def init_hook(self, module):
            there.discard(type(module))
            return module

    monkeypatch.setattr("accelerate.big_modeling.CpuOffload", Noting)
    picture = Image.new("RGB", (32, 32), "red")
    options = {"image": picture} if given == "image" else {"video": [picture] * 5}
    plan = memory.plan(released, CLIP, 80)
    plan = replace(plan, parts=tuple(replace(part, place=WHOLE) for part in plan.parts))
    made = frames(place(pipeline, plan, torch.device("cpu")), **options)
    vae, encoder, transformer = map(type, (pipeline.vae, pipeline.text_encoder, pipeline.transformer))
    assert [parts for parts, _ in groupby(seen)] == [{encoder}, {vae}, {transformer}, {vae}]
    assert not there

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipeline("a ball", callback_on_step_end=fail, **options)
    assert there == {transformer}
    seen.clear()
    pipeline("a prompt that is not known yet", **options)
    assert all(len(parts) == 1 for parts in seen)
    pipeline.remove_all_hooks()
    assert torch.equal(frames(pipeline, **options), made)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.1)])
def test_eight_bits_come_close_and_leave_gates_and_norms_alone(pipeline, kind, bound) -> None:
    pytest.importorskip("torchao")
    transformer = pipeline.transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    inputs = (torch.randn(1, 16, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32))
    with torch.no_grad():
        plain = transformer(*inputs).sample
        quantize(pipeline, kind)
        error = (transformer(*inputs).sample - plain).norm() / plain.norm()
    assert 0 < error < bound
    for name, value in transformer.state_dict().items():
        large = type(value) is not torch.Tensor
        assert large == (name.startswith("blocks.") and name in quantized_names(before)), name
        if not large:
            assert torch.equal(value, before[name])
        else:
            assert value.qdata.nbytes == value.numel()


def test_four_bits_come_close_and_leave_the_rest_alone() -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"q_proj": (128, 64), "odd": (32, 64), "a_proj": (128, 4), "lm_head": (128, 300)}
    module = torch.nn.ModuleDict({name: torch.nn.Linear(*size) for name, size in sizes.items()})
    before = {name: layer.weight.clone() for name, layer in module.items()}
    inputs = torch.randn(50, 128)
    exact = module["q_proj"](inputs)
    in_four_bits(module)
    assert module["q_proj"].weight.nbytes * 8 == before["q_proj"].nbytes  # float32 before
    with torch.no_grad():
        error = (module["q_proj"](inputs) - exact).norm() / exact.norm()
    assert 0.02 < error < 0.12
    for name in ("odd", "a_proj", "lm_head"):
        assert torch.equal(module[name].weight, before[name])


def test_int4_is_four_bits_in_the_encoder_and_eight_in_the_blocks(pipeline, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(placement, "in_eight_bits", lambda module, kind: done.append((module, kind)))
    monkeypatch.setattr(placement, "in_four_bits", lambda module: done.append((module, "int4")))
    quantize(pipeline, "int4")
    blocks = [(block, "int8") for block in pipeline.transformer.blocks]
    assert done == [*blocks, (pipeline.text_encoder, "int4")]


def quantized_names(state: dict[str, torch.Tensor]) -> set[str]:
    """Matrices of the blocks that are no gates."""
    gates = ("a_proj", "b_proj")
    return {
        name
        for name, value in state.items()
        if name.endswith(".weight") and value.ndim == 2 and not any(gate in name for gate in gates)
    }


def test_the_vaes_precision_is_planned_as_it_will_be() -> None:
    cuda = torch.device("cuda")
    options = run.RunOptions(model="kairos-tiny", dtype="bfloat16", memory="80")
    plans = [
        run.planned([Request("a ball")], replace(options, vae_dtype=dtype), cuda)
        for dtype in ("auto", "float32")
    ]
    assert [plan.parts[2].dtype for plan in plans] == ["bfloat16", "float32"]
    assert plans[0].stages[2].activations_gb < plans[1].stages[2].activations_gb


def test_other_weights_are_planned_for_without_the_models_own(tmp_path, capsys) -> None:
    (tmp_path / presets.MARK).write_text('{"preset": "kairos-4b-480p"}')
    options = run.RunOptions(model=str(tmp_path), weights="mine.safetensors", memory="80")
    cuda = torch.device("cuda")
    named = run.planned([Request("a ball")], replace(options, model="kairos-4b-480p"), cuda)
    assert run.planned([Request("a ball")], options, cuda) == named
    with pytest.raises(SystemExit, match="0"):
        main(["models", "info", str(tmp_path)])
    missing = f"not downloaded; run: kairos models download kairos-4b-480p --dir {tmp_path}\n"
    assert missing in capsys.readouterr().out


def test_without_torchao_one_line_names_the_extra(pipeline, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"torchao; .*kairos-world\[quantize\]"):
        quantize(pipeline, "int8")


def test_without_bitsandbytes_too(pipeline, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match=r"bitsandbytes; .*kairos-world\[quantize\]"):
        in_four_bits(pipeline.text_encoder)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("hidden_size", "wide", "a positive whole number, got 'wide'"),
        ("num_layers", 0, "a positive whole number, got 0"),
        ("patch_size", [2, 2], "3 positive whole numbers"),
        ("patch_size", None, "3 positive whole numbers"),
        ("layer_pattern", "SXG", "S, D and G"),
        ("base_dim", "x", "a positive whole number, got 'x'"),
    ],
)
def test_a_model_with_sizes_that_are_none_is_not_described(tmp_path, name, value, wanted):
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({name: value}))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"{name} must be {wanted}"):
        info(tmp_path)
