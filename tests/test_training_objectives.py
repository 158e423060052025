"""What is trained and towards what: LoRA, distillation to few steps, preferences; merging and exporting."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_parts import clip_set, small_model, small_stage, stirred

from kairos import KairosTransformer3DModel, UserError
from kairos.schedulers import FewStepScheduler, FlowMatchScheduler
from kairos.training import run as stage_run
from kairos.training.cache import Encoders
from kairos.training.clips import Bucket, SimulatorSource
from kairos.training.distillation import DistillationObjective, energy_score
from kairos.training.flow import FlowMatching
from kairos.training.loop import save_weights, train
from kairos.training.lora import add_lora
from kairos.training.parallel import ALONE
from kairos.training.preference import PairSet, PreferenceObjective
from kairos.training.samples import SampleVideos, motion, sample_latents
from kairos.training.stage import Distillation, LoRA, Preference
from kairos.training.vae import build_vae
from kairos.training.visible import cut_around, seen, visible_root
from kairos.weights import load_transformer_file, save_folder, save_original
from kairos.weights.lora import apply_loras, parse_lora, split_weight
from kairos.weights.merge import dare, merge_files, ties

ONE_STEP = FlowMatchScheduler(), {"num_inference_steps": 1, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return clip_set(tmp_path_factory.mktemp("cache"))


def batch_of(clips):
    return FlowMatching([clips], small_stage(mix={"ti2v": 1.0})).batch(small_model(), 0, 0)


def losses_of(objective, model, steps):
    """What is minimised, while Adam minimises it on the batches of these steps."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for step in steps:
        loss, _ = objective.loss(model, step, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def velocity(model, batch):
    with torch.no_grad():
        return model(
            batch.noisy,
            batch.timestep,
            batch.prompt_embeds,
            encoder_attention_mask=batch.prompt_mask,
            chunk_frames=(batch.cut.past, batch.cut.chunk),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def lora(clips, tmp_path_factory):
    """A small model after LoRA training, and its file."""
    folder = tmp_path_factory.mktemp("lora")
    model = stirred()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, LoRA(rank=4, alpha=8, targets=("q", "o", "ffn.0", "q_proj")))
    stage = small_stage(steps=6, muon_lr=None, adamw_lr=1e-2, precision="float32", ema=0.0)
    train(model, FlowMatching([clips], stage), stage, folder)
    return model, frozen, folder / "ema"


def test_lora_trains_nothing_but_its_own(lora):
    model, frozen, folder = lora
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, frozen[name.replace(".base_layer", "")]), name
    assert [file.name for file in folder.iterdir()] == ["lora.safetensors"]
    assert any(p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_a_lora_file_makes_of_the_plain_model_the_trained_one(lora, clips):
    model, _, folder = lora
    plain, batch = stirred(), batch_of(clips)
    before = velocity(plain, batch)
    apply_loras(plain, [parse_lora(str(folder))])
    torch.testing.assert_close(velocity(plain, batch), velocity(model, batch), atol=2e-4, rtol=1e-3)
    assert not torch.allclose(velocity(plain, batch), before, atol=1e-3)


def test_diffusers_reads_the_lora_file_as_well(lora, clips):
    model, _, folder = lora
    plain, batch = stirred(), batch_of(clips)
    plain.load_lora_adapter(str(folder / "lora.safetensors"))
    torch.testing.assert_close(velocity(plain, batch), velocity(model, batch), atol=2e-4, rtol=1e-3)


def test_several_loras_add_up_by_their_weights(lora):
    file = lora[2] / "lora.safetensors"
    once, twice, none = stirred(), stirred(), stirred()
    apply_loras(once, [parse_lora(f"{file}:0.5")])
    apply_loras(twice, [parse_lora(f"{file}:0.2"), parse_lora(f"{file}:0.3")])
    apply_loras(none, [parse_lora(f"{file}:1"), parse_lora(f"{file}:-1")])
    for name, value in once.state_dict().items():
        torch.testing.assert_close(value, twice.state_dict()[name])
        torch.testing.assert_close(none.state_dict()[name], stirred().state_dict()[name])


def test_alpha_is_read_wherever_a_file_keeps_it(lora, tmp_path):
    tensors = load_file(lora[2] / "lora.safetensors")  # of rank 4
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    layer = next(name for name in tensors if "lora_A" in name).removesuffix(".lora_A.weight")
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors.items()}

    def change(named, **said):
        metadata = {"lora_adapter_metadata": json.dumps(said)} if said else None
        save_file(named, tmp_path / "file.safetensors", metadata)
        model = stirred()
        apply_loras(model, [(tmp_path / "file.safetensors", 1.0)])
        return (model.get_submodule(layer).weight - stirred().get_submodule(layer).weight).detach()

    plain = change(tensors)
    assert plain.abs().max() > 1e-3
    for scaled in (
        change(tensors, lora_alpha=32),
        change(prefixed, **{"transformer.lora_alpha": 32, "transformer.r": 4}),
        change(tensors | {f"{layer}.alpha": torch.tensor(32.0)}),
    ):
        torch.testing.assert_close(scaled, 8 * plain)
    with pytest.raises(UserError, match="scales its layers by use_rslora"):
        change(prefixed, **{"transformer.use_rslora": True})
    with pytest.raises(UserError, match="holds more than a LoRA's products: other"):
        change(tensors | {"other.diff_b": torch.zeros(3)})
    for damaged in ("{", "[]", '{"lora_alpha": "much"}'):
        save_file(tensors, tmp_path / "file.safetensors", {"lora_adapter_metadata": damaged})
        with pytest.raises(UserError, match="lora_adapter_metadata that cannot be read"):
            apply_loras(stirred(), [(tmp_path / "file.safetensors", 1.0)])


def test_loras_that_do_not_fit_are_refused_and_change_nothing(lora, tmp_path):
    file = lora[2] / "lora.safetensors"
    other = stirred(hidden_size=48)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match="does not fit this model"):
        apply_loras(other, [parse_lora(str(file))])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="holds no LoRA"):
        apply_loras(other, [parse_lora(str(tmp_path / "w.safetensors"))])
    (tmp_path / "text").write_text("no")
    with pytest.raises(UserError, match="is not a LoRA"):
        apply_loras(other, [parse_lora(str(tmp_path / "text"))])
    for wrong, message in ((f"{file}:much", "FILE:WEIGHT"), (str(tmp_path / "none"), "no LoRA at")):
        with pytest.raises(UserError, match=message):
            parse_lora(wrong)
    with pytest.raises(UserError, match="name no layer"):
        add_lora(stirred(), LoRA(targets=("nothing",)))


def test_only_the_named_parts_are_trained(clips, tmp_path):
    model, start = stirred(), stirred()
    stage = small_stage(steps=2, train=("blocks.3.", "head"))
    stage_run.train_only(model, stage)
    train(model, FlowMatching([clips], stage), stage, tmp_path)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed and all("blocks.3." in name or "head" in name for name in changed)
    whole = load_transformer_file(tmp_path / "ema")
    assert torch.equal(
        whole.get_parameter("blocks.0.ffn.0.weight"), start.get_parameter("blocks.0.ffn.0.weight")
    )


@pytest.mark.parametrize(
    ("task", "guide_continuation", "guided"),
    [("t2v", False, True), ("ti2v", False, False), ("ti2v", True, True)],
)
def test_the_student_learns_from_a_teacher_that_is_guided_as_it_is_sampled(
    clips, task, guide_continuation, guided
):
    options = Distillation(guidance_scale=3.0, guide_continuation=guide_continuation)
    stage = small_stage(objective="distillation", distillation=options, mix={task: 1.0}, precision="float32")
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, options)
    batch = objective.batch(model, 0, 0)
    plain = objective.velocity(objective.teacher, batch, batch.noise, 0.7)
    assert torch.equal(objective.guided(batch, batch.noise, 0.7), plain) is not guided


def test_a_distillation_asks_for_the_batches_that_it_says_in_the_order_that_it_says(clips, monkeypatch):
    options = Distillation(fake_score_updates=2, consistency=0.0)
    stage = small_stage(steps=3, accumulate=2, objective="distillation", distillation=options)
    objective, got = DistillationObjective(stirred(), [clips], stage, options), []

    def noted(model, step, part):
        got.append((step, part))
        return FlowMatching.batch(objective, model, step, part)

    monkeypatch.setattr(objective, "batch", noted)
    for step in range(3):
        for part in range(2):
            objective.loss(stirred(), step, part)
    assert got == [key for step in range(3) for key in objective.asked(step)]
    assert [objective.step_of(step) for step, _ in got] == [step for step in range(3) for _ in range(4)]


@pytest.mark.parametrize(("causal", "adversarial"), [("chunk", 0.5), ("none", 0.0)])
def test_distillation_goes_on_to_the_bit_and_reports_motion(clips, tmp_path, causal, adversarial):
    mix = {"t2v": 0.5, "ti2v": 0.5}
    options = Distillation(
        adversarial=adversarial,
        guidance_scale=2.0,
        fake_score_updates=2,
        fake_score_lr=1e-3,
        teacher_steps=2,
        motion_clips=2,
        motion_every=3,
    )
    stage = small_stage(
        steps=4,
        objective="distillation",
        distillation=options,
        muon_lr=None,
        adamw_lr=1e-3,
        mix=mix,
        batch_size=2,
    )
    reported = []

    class Reported(DistillationObjective):
        stop_at = None

        def loss(self, model, step, part):
            if step == self.stop_at:
                raise InterruptedError
            return super().loss(model, step, part)

        def report(self, model, step):
            numbers = super().report(model, step)
            reported.append((step, numbers))
            return numbers

    def student():
        model = stirred(causal=causal)
        objective = Reported(model, [clips], stage, options)
        return model, objective

    model, objective = student()
    fake_before = copy.deepcopy(objective.fake_score.state_dict())
    whole = train(model, objective, stage, tmp_path / "whole")
    assert [step for step, numbers in reported if numbers] == [3, 4]
    assert all(
        np.isfinite(numbers["motion_ratio"]) and numbers["motion_ratio"] > 0
        for _, numbers in reported
        if numbers
    )
    assert any(not torch.equal(v, fake_before[n]) for n, v in objective.fake_score.state_dict().items())
    assert all(
        torch.equal(v, stirred(causal=causal).state_dict()[n])
        for n, v in objective.teacher.state_dict().items()
    )

    model, objective = student()
    objective.stop_at = 2
    with pytest.raises(InterruptedError):
        train(model, objective, replace(stage, save_every_s=0.0), tmp_path / "parts")
    model, objective = student()
    parts = train(model, objective, stage, tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_fake_score_learns_the_same_in_less_memory_where_the_stage_says_so(clips):
    options = Distillation(guidance_scale=1.0, adversarial=1.0, fake_score_lr=1e-3)
    learned = []
    for checkpointing in (False, True):
        stage = small_stage(
            objective="distillation", distillation=options, mix={"t2v": 1.0}, checkpointing=checkpointing
        )
        student = stirred()
        objective = DistillationObjective(student, [clips], stage, options)
        assert objective.fake_score.gradient_checkpointing is checkpointing
        assert not objective.teacher.gradient_checkpointing
        objective.update_fake_score(student, 0, 0)
        objective.loss(student, 0, 1)[0].backward()
        learned.append(dict(objective.fake_score.named_parameters()) | gradients(student))
    for name, value in learned[0].items():
        torch.testing.assert_close(learned[1][name], value, msg=name)


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (1, 4, 4)])
def test_the_critic_judges_what_is_to_be_made_whatever_a_token_is(clips, patch):
    options = Distillation(adversarial=1.0)
    stage = small_stage(distillation=options, mix={"ti2v": 1.0})
    student = stirred(patch_size=patch)
    objective = DistillationObjective(student, [clips], stage, options)
    batch = objective.batch(student, 0, 0)
    verdict = objective.judge(batch, batch.sample, torch.Generator().manual_seed(0))
    tokens = objective.critic.verdict().unflatten(1, (batch.sample.shape[2], -1))
    torch.testing.assert_close(verdict, tokens[:, 1:].flatten(1).mean(1))


def test_a_clip_under_its_own_caption_is_never_mismatched(clips, monkeypatch):
    options = Distillation(adversarial=1.0)
    stage = small_stage(distillation=options, mix={"t2v": 1.0}, text_dropout=0.0)
    student = stirred()
    objective = DistillationObjective(student, [clips], stage, options)
    batch = objective.batch(student, 0, 0)
    told = torch.tensor([5.0] + [0.0] * (len(batch) - 1))
    batch.prompt_embeds.copy_(torch.arange(len(batch))[:, None, None].expand_as(batch.prompt_embeds))

    def judge(batch, latents, generator, *, mismatched=False):
        return told if mismatched else torch.zeros(len(batch))

    monkeypatch.setattr(objective, "judge", judge)

    def mismatched():
        loss = objective.critic_loss(batch, batch.sample, torch.Generator())
        return 2 * (loss.item() - 1.5 * math.log(2))

    assert mismatched() == pytest.approx(F.softplus(told).mean().item(), rel=1e-4)
    for part in (batch.prompt_embeds, batch.prompt_mask):
        part.copy_(part[:1].clone().expand_as(part))
    assert mismatched() == pytest.approx(0.0, abs=1e-5)
    batch.prompt_embeds[0] += 1  # unlike the last one, before it, and the second, behind it
    assert mismatched() == pytest.approx(F.softplus(told[:2]).mean().item(), rel=1e-4)


def gradients(model):
    return {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_critic_learns_to_tell_clips_and_captions_and_the_student_hears_of_it(clips):
    options = Distillation(
        guidance_scale=1.0, adversarial=1.0, matching=0.0, consistency=0.0, fake_score_lr=1e-3
    )
    stage = small_stage(distillation=options, mix={"t2v": 1.0}, precision="float32", batch_size=4)
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, options)

    def loss() -> float:
        batch, generator = objective.batch(model, 0, 0), objective.generator(0, 0, 0)
        with torch.no_grad():
            made = objective.make(model, batch, generator, 0, with_gradient=False)
            return objective.critic_loss(batch, made, generator).item()

    before = loss()
    for update in range(30):
        objective.update_fake_score(model, 0, update)
    assert loss() < 0.9 * before
    told, clips_seen = objective.loss(model, 0, 0)
    told.backward()
    assert clips_seen == 16
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_the_teacher_may_be_another_than_the_start(clips):
    options = Distillation()
    stage = small_stage(distillation=options, mix={"t2v": 1.0})
    objective = DistillationObjective(stirred(1), [clips], stage, options, teacher=stirred(2))
    for network in (objective.teacher, objective.fake_score):
        assert all(torch.equal(v, stirred(2).state_dict()[n]) for n, v in network.state_dict().items())


def test_where_the_start_tells_how_it_goes_on_the_student_learns_the_clip_and_asks_no_teacher(
    clips, tmp_path
):
    options = Distillation(guidance_scale=1.0, truth=1.0, fake_score_updates=1)
    stage = small_stage(
        steps=40,
        distillation=options,
        mix={"continuation": 1.0},
        precision="float32",
        muon_lr=None,
        past_noise=0.0,
    )
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, options)
    fake_before = copy.deepcopy(objective.fake_score.state_dict())

    def refuse(*_, **__):
        raise AssertionError("the teacher was asked")

    objective.guided = refuse

    def distance():
        truth = clips.latents([0, 1, 2, 3])
        made = sample_latents(
            model,
            clips,
            [0, 1, 2, 3],
            steps=4,
            guidance_scale=1.0,
            few_step=objective.scheduler,
            known_frames=2,
        )
        return (made - truth)[:, :, 2:].square().mean().item()

    before = distance()
    train(model, objective, stage, tmp_path)
    assert distance() < 0.9 * before
    assert all(torch.equal(v, fake_before[n]) for n, v in objective.fake_score.state_dict().items())
    objective.stage = replace(stage, mix={"ti2v": 1.0})  # one frame tells no speed
    objective.sigmas = [1.0, 0.9, 0.0]
    with pytest.raises(AssertionError, match="the teacher was asked"):
        objective.loss(model, 0, 0)


def test_a_step_with_little_noise_to_take_away_takes_it_off_true_clips(clips):
    options = Distillation(truth=1.0, consistency=0.0, matching=0.0)  # nothing else teaches the first frame
    stage = small_stage(distillation=options, mix={"t2v": 1.0}, precision="float32")
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, options)
    batch = objective.batch(model, 0, 0)
    assert [objective.is_determined(batch, step) for step in range(4)] == [False, False, False, True]

    def velocity(network, batch, noisy, sigma, prompt=None):
        assert network is model, "neither the teacher nor the fake score has a say"
        assert sigma == objective.sigmas[3] < 0.4
        assert (noisy - (1 - sigma) * batch.sample).std().item() == pytest.approx(sigma, rel=0.1)
        return (noisy - batch.sample) / sigma

    objective.velocity = velocity
    for step in range(4):
        loss, _ = objective.loss(model, step, 0)
        assert loss < 1e-10


def unrolled_objective(model, clips, **changes):
    options = Distillation(truth=1.0, consistency=0.0, matching=0.0, unrolled=3)
    stage = small_stage(distillation=options, mix={"rollout": 1.0}, precision="float32", **changes)
    return DistillationObjective(model, [clips], stage, options)


def test_an_unrolled_student_goes_on_as_a_rollout_does(tmp_path, monkeypatch):
    """Each chunk behind the true past and its own chunks, with the past in chunks as well."""
    clips = clip_set(tmp_path, 4, Bucket(33, 32, 32))
    model = stirred()
    objective = unrolled_objective(model, clips)
    made, given = [], []
    monkeypatch.setattr(
        "kairos.training.distillation.seen", lambda error, root: made.append(error.detach()) or error
    )
    model.register_forward_pre_hook(
        lambda module, inputs, options: given.append(
            (*inputs[:2], options["chunk_frames"], options["state"])
        ),
        with_kwargs=True,
    )
    objective.draw_step = lambda step, part, use: 3  # the last one: what is learned is what goes on
    batch = next(
        batch
        for batch in map(lambda step: objective.batch(model, step, 0), range(40))
        if batch.cut.chunks == 3
    )
    past, size = batch.cut.past, batch.cut.chunk
    objective.unrolled_loss(model, batch, torch.Generator().manual_seed(0), 0, 0)

    clean = [call for call in given if not call[1].any()]
    assert torch.equal(clean[0][0], batch.sample[:, :, :past]) and clean[0][3] is None
    assert sum(clean[0][2]) == past and set(clean[0][2][1:]) <= {size} and clean[0][2][0] <= size
    for number in range(2):
        begin = past + number * size
        own = batch.sample[:, :, begin : begin + size] + made[number]
        assert torch.allclose(clean[number + 1][0], own, atol=1e-6)
        assert clean[number + 1][3].frames == begin
    assert len(clean) == 3 and len(given) == 3 + 3 * 4 and len(made) == 3


def test_an_unrolled_student_learns(tmp_path):
    clips = clip_set(tmp_path, 4, Bucket(33, 32, 32))
    model = stirred()
    objective = unrolled_objective(model, clips)
    step = next(step for step in range(40) if objective.batch(model, step, 0).cut.chunks == 3)
    losses = losses_of(objective, model, [step] * 15)
    assert losses[-1] < 0.8 * losses[0]


def test_unrolling_asks_for_the_truth_and_for_rollouts():
    with pytest.raises(UserError, match="unrolled goes with truth"):
        Distillation(unrolled=2)
    options = Distillation(truth=1.0, unrolled=2)
    with pytest.raises(UserError, match="unrolled needs the task rollout"):
        small_stage(distillation=options, mix={"t2v": 1.0})
    small_stage(distillation=options, mix={"t2v": 1.0}, buckets=(Bucket(33, 32, 32, mix={"rollout": 1.0}),))


def test_the_critic_is_told_that_the_past_is_clean(clips):
    options = Distillation(adversarial=1.0)
    stage = small_stage(distillation=options, mix={"ti2v": 1.0}, past_noise=1.0, precision="float32")
    model, told = stirred(), []
    objective = DistillationObjective(model, [clips], stage, options)
    objective.fake_score.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    batches = [objective.batch(model, step, 0) for step in range(40)]
    batch = next(batch for batch in batches if batch.sigma[:, :1].any())
    objective.judge(batch, batch.sample, torch.Generator().manual_seed(0))
    assert not told[0][:, :1].any() and told[0][:, 1:].all()


def test_the_empty_prompt_of_guidance_is_read_once(clips, monkeypatch):
    asked, read = [], clips.embeddings
    monkeypatch.setattr(clips, "embeddings", lambda *given: (asked.append(given[0]), read(*given))[1])
    objective = DistillationObjective(stirred(), [clips], small_stage(), Distillation())
    batch = batch_of(clips)
    one, two = (objective.guided(batch, batch.noise, 0.5) for _ in range(2))
    assert asked.count([""]) == 1 and torch.equal(one, two)


def test_pictures_have_no_motion_to_compare_and_their_samples_no_first_frame(tmp_path):
    pictures = clip_set(tmp_path, 2, Bucket(1, 32, 32))
    options = Distillation(teacher_steps=1, motion_every=0)
    stage = small_stage(distillation=options, mix={"t2v": 1.0}, steps=3)
    model = stirred()
    objective = DistillationObjective(model, [pictures], stage, options)
    assert [objective.report(model, step) for step in (1, 3)] == [{}, {}]
    pictures.captions = ["", ""]
    vae = build_vae(base_dim=8).eval()
    encoders = Encoders(vae, None, None, "tiny")
    (one, _) = SampleVideos(pictures, encoders, ALONE, *ONE_STEP)(model, tmp_path, 1)
    assert one.shape == (1, 32, 32, 3)


def test_motion_is_told_of_clips_that_are_made_whole(tmp_path, monkeypatch):
    long = Bucket(33, 32, 32, mix={"rollout": 1.0})
    sets = [clip_set(tmp_path, 2), clip_set(tmp_path, 2, long)]
    options = Distillation(truth=1.0, unrolled=2, consistency=0.0, matching=0.0, teacher_steps=1)
    stage = small_stage(
        distillation=options, mix={"continuation": 1.0}, buckets=(sets[0].bucket, long), steps=3
    )
    model, asked = stirred(), []

    def sampled(network, clips, *given, **options):
        asked.append(clips.bucket.frames)
        return sample_latents(network, clips, *given, **options)

    monkeypatch.setattr("kairos.training.distillation.sample_latents", sampled)
    told = DistillationObjective(model, sets, stage, options).report(model, 3)
    assert told["motion_ratio"] > 0 and asked == [17, 17]


@pytest.mark.parametrize("options", [{}, {"truth": 1.0, "sampling_times": (1000, 800)}])
def test_a_distillation_that_teaches_nothing_is_refused(options):
    with pytest.raises(UserError, match="nothing to teach"):
        Distillation(consistency=0.0, matching=0.0, **options)


def test_the_energy_score_is_best_for_samples_that_are_spread_as_the_data_are():
    generator = torch.Generator().manual_seed(0)

    def drawn(spread: float, count: int = 4000) -> Tensor:
        """Clips of three frames that are all 1 or all -1, times spread."""
        signs = torch.randint(0, 2, (count, 1, 1, 1, 1), generator=generator) * 2.0 - 1
        return spread * signs * torch.ones(count, 2, 3, 2, 2)

    def value(spread: float) -> float:
        return energy_score(drawn(spread), drawn(spread), drawn(1.0), past=1).item()

    ones = torch.ones(4000, 2, 3, 2, 2)
    right, narrow, wide = value(1.0), value(0.7), value(1.4)
    one_mode = energy_score(ones, ones, drawn(1.0), past=1).item()
    assert min(narrow, wide, one_mode) > right + 0.3
    given = drawn(1.0)
    given[:, :, 0] = 100.0  # what is given is not scored
    assert energy_score(given, drawn(1.0), drawn(1.0), past=1).item() == pytest.approx(right, abs=0.2)


def test_a_student_may_learn_from_the_clips_spread_alone(clips):
    options = Distillation(score=1.0, matching=0.0, consistency=0.0)
    stage = small_stage(distillation=options, mix={"t2v": 1.0}, precision="float32", batch_size=4)
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, options)
    fake_before = copy.deepcopy(objective.fake_score.state_dict())
    losses = losses_of(objective, model, range(40))
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
    assert all(torch.equal(v, fake_before[n]) for n, v in objective.fake_score.state_dict().items())


def test_errors_of_latents_count_by_what_they_change_in_the_picture(clips):
    vae = build_vae(base_dim=8)
    vae.register_to_config(latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    with torch.no_grad():
        vae.post_quant_conv.weight[:, 3] = 0.0  # nobody sees channel 3
        vae.post_quant_conv.weight[:, 7] *= 5.0
    vae.eval()
    root = visible_root(vae, clips, 1.0)
    assert torch.equal(root, visible_root(vae, clips, 1.0))
    assert (root @ root).trace().item() == pytest.approx(16, rel=1e-4)
    counted = root.square().sum(0)
    assert counted[3] < 1e-6 and counted.argmax() == 7
    mixed = visible_root(vae, clips, 0.25)
    torch.testing.assert_close(mixed @ mixed, 0.25 * root @ root + 0.75 * torch.eye(16), atol=1e-4, rtol=0)

    # What the matrix says of an error is what the picture says, but for the place that is asked.
    latents = clips.latents([0, 1, 2, 3])
    generator = torch.Generator().manual_seed(1)
    said, shown = [], []
    for _ in range(8):
        error = torch.zeros_like(latents)
        error[:, :, 2, 1, 2] = 0.3 * torch.randn(16, generator=generator)
        said.append(seen(error, root).square().sum().item())
        with torch.no_grad():
            change = vae.decode(latents + error).sample - vae.decode(latents).sample
        shown.append(change.square().sum().item())
    assert np.corrcoef(said, shown)[0, 1] > 0.9


@pytest.mark.parametrize("place", [(0, 0, 0), (8, 20, 3), (4, 11, 19)])
def test_a_window_lies_inside_the_clip_and_says_where_its_place_is(place):
    clip = torch.arange(9 * 21 * 20).reshape(1, 9, 21, 20)
    window, at = cut_around(clip, place)
    assert window.shape == (1, 5, 8, 8)
    assert window[(0, *at)] == clip[(0, *place)]
    small = torch.arange(12).reshape(1, 1, 3, 4)
    window, at = cut_around(small, (0, 2, 1))
    assert torch.equal(window, small) and at == [0, 2, 1]


def test_one_picture_of_one_tone_has_a_place_to_ask_at(tmp_path):
    root = visible_root(build_vae(base_dim=8).bfloat16(), clip_set(tmp_path, 1, Bucket(1, 32, 32)), 0.5)
    assert root.dtype == torch.float32 and root.isfinite().all()


def test_errors_are_not_rounded_on_their_way(clips):
    latents = clips.latents([0]) + 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seen(latents, torch.eye(16)), latents)


@pytest.mark.parametrize("objective", ["flow", "truth", "score"])
def test_what_is_not_seen_is_not_learned(clips, objective):
    options = Distillation(
        consistency=0.0, matching=0.0, truth=float(objective == "truth"), score=float(objective != "truth")
    )
    mix = {"continuation": 1.0} if objective == "truth" else {"t2v": 1.0}
    stage = small_stage(distillation=options, mix=mix, precision="float32")
    model = stirred()

    def loss(root):
        if objective == "flow":
            return FlowMatching([clips], stage, root=root).loss(model, 0, 0)[0].item()
        return DistillationObjective(model, [clips], stage, options, root=root).loss(model, 0, 0)[0].item()

    usual = loss(None)
    assert loss(torch.eye(16)) == pytest.approx(usual, rel=1e-5)
    one = torch.zeros(16, 16)
    one[5, 5] = 1.0
    assert 0 < loss(one) < 0.5 * usual


def test_distribution_matching_moves_the_student_to_the_teacher_and_off_the_fake(clips):
    """The gradient for the student's sample is (x0 of the fake score - x0 of the teacher) over its scale."""
    options = Distillation(guidance_scale=1.0)
    stage = small_stage(precision="float32", muon_lr=None, mix={"ti2v": 1.0})
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, options)
    batch = objective.batch(model, 0, 0)
    sample = batch.sample.clone().requires_grad_(True)
    teacher, fake = 0.3, 0.1
    objective.velocity = lambda network, batch, noisy, sigma, prompt=None: torch.full_like(
        noisy, teacher if network is objective.teacher else fake
    )
    objective.matching_loss(batch, sample, torch.Generator().manual_seed(0)).backward()
    past = batch.cut.past
    assert not sample.grad[:, :, :past].any()
    # x0 = z - sigma v: the teacher's lies lower, so the sample is pushed down: a gradient above 0.
    assert (sample.grad[:, :, past:] > 0).all()


def test_consistency_asks_for_nothing_where_the_student_is_a_straight_teacher(clips):
    """A teacher with one velocity for a clip takes the same way from every time."""
    stage = small_stage(precision="float32", muon_lr=None, mix={"ti2v": 1.0})
    model = stirred()
    objective = DistillationObjective(model, [clips], stage, Distillation(guidance_scale=1.0))
    objective.velocity = lambda network, batch, noisy, sigma, prompt=None: torch.full_like(noisy, 0.5)
    batch = objective.batch(model, 0, 0)
    for number in range(4):
        loss = objective.consistency_loss(model, batch, number)
        assert loss < 1e-9


def asked_networks(clips, task, **options):
    """An objective whose networks have a velocity each, a number, and note when they are asked.

    Under guidance the teacher's with words counts thrice, less twice that without."""
    options = Distillation(guidance_scale=3.0, **options)
    stage = small_stage(distillation=options, precision="float32", muon_lr=None, mix={task: 1.0})
    model, asked = stirred(), []
    objective = DistillationObjective(model, [clips], stage, options)
    names = {id(model): "student", id(objective.teacher): "teacher", id(objective.fake_score): "fake"}
    speeds = {"student": 0.7, "teacher": 0.3, "fake": 0.1, "teacher without": 0.2}

    def velocity(network, batch, noisy, sigma, prompt=None):
        name = names[id(network)] + (" without" if prompt is not None else "")
        asked.append((name, sigma))
        return torch.full_like(noisy, speeds[name])

    objective.velocity = velocity
    return objective, model, asked, 3 * 0.3 - 2 * 0.2


def test_matching_asks_the_guided_teacher_and_divides_by_its_distance(clips):
    objective, model, asked, guided = asked_networks(clips, "ti2v")
    batch = objective.batch(model, 0, 0)
    made = batch.sample.clone().requires_grad_(True)
    objective.matching_loss(batch, made, torch.Generator().manual_seed(0)).backward()
    assert {name for name, _ in asked} == {"teacher", "teacher without", "fake"}
    (sigma,) = {sigma for _, sigma in asked}
    # The same noise is drawn again, for what the teacher makes of the sample under it.
    generator = torch.Generator().manual_seed(0)
    torch.rand((), generator=generator)
    noisy = objective.noised(batch, batch.sample, sigma, objective.draw(batch.sample, generator))
    future = slice(batch.cut.past, None)
    real = (noisy - sigma * guided)[:, :, future]
    scale = (batch.sample[:, :, future] - real).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = (sigma * (guided - 0.1) / scale).expand_as(real) / real.numel()
    torch.testing.assert_close(made.grad[:, :, future], expected, atol=0, rtol=1e-3)


def test_consistency_asks_the_guided_teacher_for_the_step_and_for_the_end(clips):
    objective, model, asked, guided = asked_networks(clips, "ti2v")
    batch = objective.batch(model, 0, 0)
    for number in range(4):
        asked.clear()
        sigma, following = objective.sigmas[number], objective.sigmas[number + 1]
        loss = objective.consistency_loss(model, batch, number)
        teachers = [("teacher", sigma), ("teacher without", sigma)]
        if following > 0:
            teachers += [("teacher", following), ("teacher without", following)]
        assert asked == [*teachers, ("student", sigma)]
        # The teacher goes all the way from sigma to 0, and so does the student, each at its own speed.
        assert loss.item() == pytest.approx((sigma * (0.7 - guided)) ** 2, rel=1e-3)


def test_sample_videos_are_made_in_the_stages_precision(clips, tmp_path, monkeypatch):
    monkeypatch.setattr("kairos.training.parallel.has_bfloat16", lambda device: True)
    encoders = Encoders(build_vae(base_dim=8).eval(), None, None, "tiny")
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        model, seen_types = stirred(), set()
        model.blocks[0].ffn[0].register_forward_hook(lambda *call, kept=seen_types: kept.add(call[-1].dtype))
        SampleVideos(clips, encoders, ALONE, *ONE_STEP, count=1, precision=precision)(model, tmp_path, 1)
        assert seen_types == {dtype}


def test_a_student_samples_in_four_steps_from_its_first_frame(clips):
    student = stirred().train()
    made = sample_latents(
        student, clips, [0, 1], steps=20, guidance_scale=5.0, few_step=FewStepScheduler(), known_frames=1
    )
    truth = clips.latents([0, 1])
    assert made.shape == truth.shape and student.training
    assert torch.equal(made[:, :, :1], truth[:, :, :1])
    assert motion(torch.zeros(1, 16, 5, 4, 4)) == 0 < motion(made)


def pair_set(folder, count=4):
    better, worse = clip_set(folder / "better", count), clip_set(folder / "worse", count)
    worse.places = worse.places[::-1]
    return PairSet(better, worse, [1] * count)


def test_preferences_are_learned(tmp_path):
    pairs = pair_set(tmp_path)
    stage = small_stage(
        steps=60,
        objective="preference",
        muon_lr=None,
        adamw_lr=1e-3,
        batch_size=4,
        precision="float32",
        warmup_steps=5,
    )
    model = stirred()
    objective = PreferenceObjective(model, pairs, stage, Preference(beta=200.0))
    losses = []

    def watched(model, step, part):
        loss, count = PreferenceObjective.loss(objective, model, step, part)
        losses.append(loss.item())
        return loss, count

    objective.loss = watched
    train(model, objective, stage, tmp_path / "run")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # the model is its own reference
    assert np.mean(losses[-10:]) < 0.8 * np.log(2)
    assert (objective.differences(model, [0, 1, 2, 3], 1, [3, 4, 5, 6]) < 0).float().mean() >= 0.75


def test_the_parts_of_a_batch_of_pairs_are_the_whole(tmp_path):
    """Each pair has its own time and noise, whichever part or process it comes to."""
    pairs, start = pair_set(tmp_path), stirred(1)
    losses, gradients = [], []
    for parts in (1, 2):
        stage = small_stage(objective="preference", accumulate=parts, precision="float32")
        objective, model = PreferenceObjective(start, pairs, stage, Preference(beta=5.0)), stirred(2)
        shares = [objective.loss(model, 3, part)[0] / parts for part in range(parts)]
        sum(shares).backward()
        losses.append(sum(shares).item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


def test_both_clips_of_a_pair_carry_the_same_noise(tmp_path):
    pairs, model, given = pair_set(tmp_path), stirred(), []
    model.register_forward_pre_hook(lambda module, inputs: given.append(inputs[:2]))
    stage = small_stage(objective="preference", precision="float32")
    PreferenceObjective(model, pairs, stage, Preference()).differences(model, [0, 1], 1, [3, 4])
    noisy, times = given[-1]
    spread = times[:, None, :, None, None] / 1000
    better, worse = pairs.better.latents([0, 1]), pairs.worse.latents([0, 1])
    worse[:, :, :1] = better[:, :, :1]
    noise = (noisy - (1 - spread) * torch.cat([better, worse]))[:, :, 1:] / spread[:, :, 1:]
    assert torch.equal(times[:2], times[2:]) and not torch.equal(times[0], times[1])
    torch.testing.assert_close(noise[:2], noise[2:], atol=1e-3, rtol=1e-3)
    assert (noise[0] - noise[1]).abs().mean() > 0.5 and noise.std() == pytest.approx(1.0, abs=0.1)


def test_pairs_are_noised_as_the_stages_times_say(tmp_path):
    pairs, times = pair_set(tmp_path), []
    model = stirred()
    model.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1].max().item()))
    for mean in (-4.0, 4.0):
        stage = small_stage(objective="preference", time_mean=mean, time_std=0.1, precision="float32")
        PreferenceObjective(model, pairs, stage, Preference()).differences(model, [0], 1, [0])
    assert times[0] < 500 < times[-1]


def test_the_random_half_of_a_lora_is_a_function_of_the_seed():
    begun = []
    for seed in (0, 0, 1):
        model = stirred()
        state = torch.get_rng_state()
        add_lora(model, LoRA(rank=2, targets=("q",)), seed)
        assert torch.equal(state, torch.get_rng_state())
        begun.append(torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n]))
    assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])


def test_the_physics_measures_make_pairs(tmp_path):
    from kairos.presets import load_pipeline
    from kairos.training.preference import LIST, load_pairs, rollout_pairs

    pipeline = load_pipeline("kairos-tiny-teacher", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    options = Preference(pairs=2, sampling_steps=2, guidance_scale=1.0)
    bucket = Bucket(13, 64, 64)
    source = SimulatorSource(("uniform",))
    made_by = pipeline, Encoders(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, "tiny")
    said = rollout_pairs(tmp_path, *made_by, source, bucket, options)
    assert said["better"] < said["worse"] and said["pairs"] >= 1
    listed = (tmp_path / LIST).stat().st_mtime_ns
    assert rollout_pairs(tmp_path, *made_by, source, bucket, replace(options, beta=1.0)) == said
    assert (tmp_path / LIST).stat().st_mtime_ns == listed  # they are there
    said = rollout_pairs(tmp_path, *made_by, source, bucket, options, seed=1)
    assert (tmp_path / LIST).stat().st_mtime_ns != listed
    pairs = load_pairs(tmp_path, bucket, made_by[1])
    assert len(pairs) == said["pairs"] and pairs.past[0] == 2
    better, worse = pairs.better.latents([0]), pairs.worse.latents([0])
    assert torch.equal(better[:, :, :2], worse[:, :, :2]) and not torch.equal(better, worse)


def test_what_decides_about_pairs_is_the_same_in_every_process(tmp_path, monkeypatch):
    """diffusers keeps a list in a scheduler's configuration whose order is that of a set."""
    from conftest import random_pipeline

    from kairos.training import preference

    told = []
    monkeypatch.setattr(preference, "digest", lambda what: told.append(what) or "of")
    monkeypatch.setattr(preference, "read_list", lambda folder: {"of": "of", "said": {}})
    pipeline = random_pipeline()
    encoders = Encoders(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, "tiny")
    source, options = SimulatorSource(("uniform",)), Preference()
    for scheduler in (FewStepScheduler(), FewStepScheduler(shift=3.0)):
        made = encoders.pipeline(pipeline.transformer, scheduler, pipeline.config.defaults)
        preference.rollout_pairs(tmp_path, made, encoders, source, Bucket(13, 64, 64), options)
    assert told[0] != told[1] and '"_' not in json.dumps(told)


def test_the_simulator_draws_squares_alone(tmp_path):
    from kairos.training.preference import rollout_pairs

    source, wide = SimulatorSource(("uniform",)), Bucket(13, 64, 96)
    with pytest.raises(UserError, match="pictures are square, bucket 13x64x96 is not"):
        list(source.references([wide], None))
    with pytest.raises(UserError, match="pictures are square, bucket 13x64x96 is not"):
        rollout_pairs(tmp_path, None, None, source, wide, Preference())


def test_pairs_are_made_again_where_what_they_were_made_of_has_changed(tmp_path, monkeypatch, caplog):
    from kairos.data.media import write_video
    from kairos.training import preference

    class Counted(Encoders):
        def hashes(self):
            return "v", "t"

        def embed(self, captions, device="cpu", images=None):
            devices.add(str(device))
            tokens = 1 if images is None else 1 + np.asarray(images[0]).mean().round().astype(int)
            return [torch.zeros(tokens, 4, dtype=torch.bfloat16) for _ in captions]

    encoders, bucket = (
        Counted(build_vae(base_dim=8).eval(), torch.nn.Linear(1, 1), None, "tiny"),
        Bucket(5, 32, 32),
    )
    manifest, read, devices = tmp_path / "m.jsonl", [], set()
    take = preference.read_video
    monkeypatch.setattr(preference, "read_video", lambda path, **o: read.append(path.name) or take(path, **o))
    for number in range(2):
        frames = np.full((9, 32, 32, 3), 40 * number, np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, 16, scale=1)
    for better, fps in ((0, 16), (0, 16), (1, 16), (1, 12)):
        manifest.write_text(json.dumps({"better": f"{better}.mp4", "worse": f"{1 - better}.mp4"}))
        preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps, "cpu:0")
        assert len(preference.load_pairs(tmp_path / "pairs", bucket, encoders)) == 1
        read.append("|")
    assert "".join(read).replace(".mp4", "") == "01||10|10|"
    assert devices == {"cpu:0"}
    write_video(tmp_path / "0.mp4", np.full((9, 32, 32, 3), 80, np.uint8), 16, scale=1)
    read.clear()
    preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps)
    assert read == ["1.mp4", "0.mp4"]  # under its old name it is another clip
    # What is made is not lost with what it was made of, nor made again when that is back.
    gone, read[:] = tmp_path / "0.mp4", []
    gone.rename(tmp_path / "kept")
    preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps)
    with pytest.raises(UserError, match=r"no file '0\.mp4' in"):
        preference.manifest_pairs(tmp_path / "none", manifest, bucket, encoders, fps)
    text = manifest.read_text()
    manifest.unlink()
    preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps)
    assert caplog.text.count("stay as they are") == 2
    manifest.write_text("{")
    with pytest.raises(UserError, match="line 1: not JSON"):
        preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps)
    (tmp_path / "kept").rename(gone)
    manifest.write_text(text)
    preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps)
    assert not read
    # Where the template holds pictures, the first frame is before the words: here of some 40 tokens.
    manifest.write_text(json.dumps({"better": "1.mp4", "worse": "0.mp4", "given_frames": 1}))
    seeing = replace(encoders, template="2026")
    preference.manifest_pairs(tmp_path / "seen", manifest, bucket, seeing, fps=16)
    better = preference.load_pairs(tmp_path / "seen", bucket, seeing).better
    assert better.embeddings([""], better.keys)[0].shape[1] > 30 and better.embeddings([""])[0].shape[1] == 1


def test_a_pair_that_cannot_be_used_is_left_out_and_the_others_are_made(tmp_path, monkeypatch, caplog):
    from kairos.data.media import write_video
    from kairos.training import preference

    monkeypatch.setattr(Encoders, "hashes", lambda self: ("v", "t"))
    embedded = [torch.zeros(1, 4, dtype=torch.bfloat16)]
    monkeypatch.setattr(Encoders, "embed", lambda self, captions, *_: embedded * len(captions))
    encoders = Encoders(build_vae(base_dim=8).eval(), torch.nn.Linear(1, 1), None, "tiny")
    bucket = Bucket(5, 32, 32)
    for name, frames in (("good", 9), ("short", 3)):
        write_video(tmp_path / f"{name}.mp4", np.zeros((frames, 32, 32, 3), np.uint8), 16, scale=1)
    (tmp_path / "broken.mp4").write_bytes(b"none")
    manifest = tmp_path / "m.jsonl"

    def pairs(*others):
        lines = [json.dumps({"better": "good.mp4", "worse": f"{other}.mp4"}) for other in others]
        manifest.write_text("\n".join(lines))
        preference.manifest_pairs(tmp_path / "pairs", manifest, bucket, encoders, fps=16)
        return [pair["key"] for pair in preference.read_list(tmp_path / "pairs")["pairs"]]

    assert pairs("short", "good", "broken", "good") == ["m.jsonl/2", "m.jsonl/4"]
    assert "m.jsonl, line 1: left out: " in caplog.text and "has 3 frames, 5 are needed" in caplog.text
    assert caplog.text.count("left out") == 2 and "line 3: left out" in caplog.text
    with pytest.raises(UserError, match=r"m\.jsonl: none of its pairs can be used"):
        pairs("short", "broken")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "a"}, "unknown key 'prompt'"),
        ({"given_frame": 5}, "unknown key 'given_frame'; did you mean 'given_frames'"),
        ({"caption": 3}, '"caption" must be a text, got 3'),
        ({"worse": "gone.mp4"}, "no file 'gone.mp4' in"),
    ],
)
def test_a_line_that_is_no_pair_is_refused_with_its_number(tmp_path, entry, message):
    from kairos.training.preference import read_pair

    (tmp_path / "a.mp4").touch()
    pair = {"better": "a.mp4", "worse": "a.mp4"}
    assert read_pair(tmp_path / "m.jsonl", Bucket(9, 32, 32), 2, pair)[2:] == ("", 0)
    with pytest.raises(UserError, match=message) as caught:
        read_pair(tmp_path / "m.jsonl", Bucket(9, 32, 32), 2, pair | entry)
    assert "line 2" in str(caught.value)


def test_exports_come_back_in_both_layouts(clips, tmp_path):
    model, batch = stirred(), batch_of(clips)
    save_original(model, tmp_path / "one.safetensors")
    save_folder(model, tmp_path / "folder")
    save_weights(tmp_path / "ema", model, dict(model.named_parameters()))
    merge_files([(str(tmp_path / "ema"), 1.0)] * 2, tmp_path / "merged.safetensors")
    for again in (
        load_transformer_file(tmp_path / "one.safetensors"),
        load_transformer_file(tmp_path / "merged.safetensors"),
        KairosTransformer3DModel.from_pretrained(tmp_path / "folder").eval(),
        KairosTransformer3DModel.from_pretrained(tmp_path / "ema").eval(),
    ):
        assert torch.equal(velocity(again, batch), velocity(model.eval(), batch))


@pytest.fixture
def three(tmp_path):
    """A base and two models that were trained from it, as files."""
    torch.manual_seed(0)
    base = {"a": torch.randn(6, 5), "b": torch.randn(7)}
    models = [
        {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items()} for _ in range(2)
    ]
    for name, tensors in zip(("base", "one", "two"), (base, *models), strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    return tmp_path, base, models


def merged(folder, method="average", weights=(1.0, 1.0), **options):
    files = [
        (str(folder / f"{name}.safetensors"), w) for name, w in zip(("one", "two"), weights, strict=True)
    ]
    base = str(folder / "base.safetensors")
    merge_files(files, folder / "out.safetensors", method=method, base=base, **options)
    return load_file(folder / "out.safetensors")


def test_an_average_is_weighted(three):
    folder, _, (one, two) = three
    result = merged(folder, weights=(3.0, 1.0))
    for name, value in result.items():
        torch.testing.assert_close(value, 0.75 * one[name] + 0.25 * two[name])


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_differences_from_the_base_are_weighted(three, method):
    folder, base, (one, _) = three
    result = merged(folder, method, weights=(0.5, 0.0), density=1.0)
    for name, value in result.items():
        torch.testing.assert_close(value, base[name] + 0.5 * (one[name] - base[name]))


def test_merging_one_model_with_everything_kept_gives_it_back(three):
    folder, _, (one, _) = three
    file = (str(folder / "one.safetensors"), 1.0)
    for method in ("average", "ties", "dare"):
        base = str(folder / "base.safetensors")
        merge_files([file], folder / "out.safetensors", method=method, base=base, density=1.0)
        for name, value in load_file(folder / "out.safetensors").items():
            torch.testing.assert_close(value, one[name])


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
    differences = torch.tensor([[4.0, -1.0, 0.1, 2.0], [2.0, 3.0, 0.2, -5.0]])
    assert ties(differences, 0.75).tolist() == [3.0, 3.0, 0.0, -5.0]


def test_a_single_number_is_merged_too():
    assert ties(torch.tensor([2.0, 4.0]), 0.5).item() == 3.0
    assert ties(torch.zeros(2, 0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_a_merge_does_not_write_are_refused_before_it_writes(tmp_path, dtype):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(2), "b": torch.zeros(2).to(dtype)}, tmp_path / f"{name}.safetensors")
    files = [(str(tmp_path / f"{name}.safetensors"), 1.0) for name in ("one", "two")]
    with pytest.raises(UserError, match=r"b in .*one.safetensors is .*, and a merge takes float32, .*int64"):
        merge_files(files, tmp_path / "out.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_dare_keeps_a_share_and_the_mean(three):
    kept = dare(torch.ones(1, 100_000), 0.25, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 4.0} and abs(kept.mean() - 1) < 0.03
    folder, *_ = three
    first, again = (merged(folder, "dare", seed=3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[n], v) for n, v in merged(folder, "dare", seed=4).items())


def test_dare_chooses_anew_in_every_tensor(tmp_path):
    for name, value in (("base", 0.0), ("one", 1.0), ("two", 1.0)):
        save_file({key: torch.full((64,), value) for key in "ab"}, tmp_path / f"{name}.safetensors")
    result = merged(tmp_path, "dare")
    assert not torch.equal(result["a"], result["b"])


@pytest.mark.parametrize("method", ["average", "ties", "dare"])
def test_every_merge_keeps_the_precision(tmp_path, method):
    torch.manual_seed(0)
    for name in ("base", "one", "two"):
        save_file({"w": torch.randn(8, 8).bfloat16()}, tmp_path / f"{name}.safetensors")
    result = merged(tmp_path, method)["w"]
    assert result.dtype == torch.bfloat16 and result.isfinite().all()


def test_merging_keeps_the_precision_and_never_holds_a_model(tmp_path):
    """Tensors are read and written one at a time: at most one of each model lives at once."""
    sizes = {f"w{i}": torch.randn(64, 64).bfloat16() for i in range(6)}
    for name in ("one", "two"):
        save_file(sizes, tmp_path / f"{name}.safetensors")
    files = [(str(tmp_path / f"{name}.safetensors"), 1.0) for name in ("one", "two")]
    merge_files(files, tmp_path / "out.safetensors")
    result = load_file(tmp_path / "out.safetensors")
    assert all(
        result[name].dtype == torch.bfloat16 and torch.equal(result[name], sizes[name]) for name in sizes
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tise"}, "no method 'tise'; did you mean 'ties'"),
        ({"method": "ties", "base": None}, "ties needs --base"),
        ({"density": 0.0}, "density must be above 0"),
        ({"weights": (1.0, -1.0)}, "must not add up to 0"),
        ({"weights": (1.0, float("nan"))}, "must be a finite number, got .*two.safetensors:nan"),
    ],
)
def test_merges_that_make_no_sense_are_refused(three, options, message):
    folder = three[0]
    weights = options.pop("weights", (1.0, 1.0))
    files = [(str(folder / f"{n}.safetensors"), w) for n, w in zip(("one", "two"), weights, strict=True)]
    options = {"base": str(folder / "base.safetensors")} | options
    with pytest.raises(UserError, match=message):
        merge_files(files, folder / "out.safetensors", **options)
    assert not (folder / "out.safetensors").exists()


def test_loras_are_not_merged_matrix_by_matrix(lora, tmp_path):
    with pytest.raises(
        UserError, match=r"is a LoRA, .*; add several .*: kairos train export MODEL .* --lora"
    ):
        merge_files([(str(lora[2] / "lora.safetensors"), 1.0)] * 2, tmp_path / "out.safetensors")


def test_models_of_other_shapes_are_not_merged(three):
    folder = three[0]
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(7)}, folder / "two.safetensors")
    with pytest.raises(
        UserError, match=r"two.safetensors is of another model than the others: a is \(2, 2\)"
    ):
        merged(folder)
    with pytest.raises(UserError, match="FILE:WEIGHT"):
        split_weight("x:y", "a model")
    assert split_weight("x:0.5", "a model") == ("x", 0.5)


def test_the_metadata_of_a_lora_says_its_rank(lora):
    from safetensors import safe_open

    with safe_open(lora[2] / "lora.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["transformer.r"], said["transformer.lora_alpha"]) == (4, 4)  # alpha is in the tensors
