"""The decoder's own stage: it learns what a model's latents mean, and the encoder stays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from training_parts import clip_set

from kairos.models.vae import decode
from kairos.schedulers import FewStepScheduler, FlowMatchScheduler
from kairos.training import decoder
from kairos.training.clips import Bucket, ClipReference
from kairos.training.decoder import DecoderStage, decoder_loss, draw_latents, train_decoder
from kairos.training.samples import sample_latents
from kairos.training.vae import build_vae, pixels

BUCKET = Bucket(9, 32, 32)
SAMPLING = {"steps": 3, "guidance_scale": 1.0, "guide_continuation": True, "few_step": FewStepScheduler()}
DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0}


class Wrong:
    """A model that knows the clips, and is off by the same in every one."""

    config = SimpleNamespace(causal="chunk", patch_size=(1, 2, 2))
    dtype = torch.float32
    training = False

    def __init__(self, clips, offset=0.0):
        self.truth = {caption: clips.latents([row]) for row, caption in enumerate(clips.captions)}
        self.prompts = {caption: clips.embeddings([caption])[0][0, 0] for caption in clips.captions}
        self.offset, self.asked = offset, []

    def __call__(self, latents, timestep, embeds, **_):
        frames, times = latents.shape[2], timestep if timestep.ndim == 2 else timestep[:, None]
        self.asked.append(float(times.max()))
        known = [next(c for c, first in self.prompts.items() if torch.equal(first, row[0])) for row in embeds]
        truth = torch.cat([self.truth[caption][:, :, :frames] for caption in known])
        sigma = times[:, None, :, None, None].clamp(min=1e-9) / 1000
        return ((latents - truth - self.offset) / sigma,)

    def eval(self):
        return self

    def train(self, mode=True):
        return self

    def requires_grad_(self, needed):
        return self

    def to(self, device):
        return self


@pytest.fixture
def clips(tmp_path):
    return clip_set(tmp_path, bucket=BUCKET)


@pytest.mark.parametrize("few_step", [FewStepScheduler(), None])
def test_the_last_step_alone_starts_from_the_clip_under_noise(clips, few_step):
    model = Wrong(clips, offset=0.5)
    options = {"steps": 3, "guidance_scale": 1.0, "few_step": few_step}
    made = sample_latents(model, clips, [0, 1], last_step_alone=True, **options)
    torch.testing.assert_close(made, clips.latents([0, 1]) + 0.5, rtol=0, atol=1e-4)
    assert len(model.asked) == 3  # once for the first frame, the second and the rest
    scheduler = few_step or FlowMatchScheduler()
    scheduler.set_timesteps(3, latent_frames=3, tokens_per_frame=4)
    assert model.asked[-1] == pytest.approx(float(scheduler.timesteps[-1]))


def test_half_of_a_batch_is_sampled_from_two_latent_frames(clips):
    model, truth = Wrong(clips, offset=0.5), clips.latents([0, 1, 2, 3])
    kinds, lengths = set(), set()
    for seed in range(12):
        drawn = draw_latents(model, clips, [0, 1, 2, 3], SAMPLING, seed)
        assert torch.equal(drawn, draw_latents(model, clips, [0, 1, 2, 3], SAMPLING, seed))
        off = (drawn - truth[:, :, : drawn.shape[2]]).mean((1, 3, 4))
        torch.testing.assert_close(off[:2, :2], torch.zeros(2, 2))
        torch.testing.assert_close(off[:2, 2:], torch.full_like(off[:2, 2:], 0.5), rtol=0, atol=1e-4)
        kinds.add(tuple(off[2:].unique().mul(2).round().tolist()))
        lengths.add(drawn.shape[2])
    assert kinds == {(0.0,), (1.0,)}  # the encoder's own, or what the last step makes of them
    assert lengths == {2, 3}


def test_a_decoder_learns_what_a_model_means_and_the_encoder_stays(tmp_path):
    small = Bucket(9, 16, 16)
    clips = clip_set(tmp_path, bucket=small)
    torch.manual_seed(0)
    vae, model = build_vae(base_dim=8), Wrong(clips, offset=0.7)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
    frames = colors[:, None, None, None, :].expand(4, 9, 16, 16, 3)
    references = {
        key: ClipReference(key, key, "", small, lambda row=row: frames[row].numpy())
        for row, key in enumerate(clips.keys)
    }

    def error():
        with torch.no_grad():
            made = sample_latents(model, clips, range(4), known_frames=2, **SAMPLING)
            return float((decode(vae, made) - pixels(frames, "cpu")).square().mean())

    wrong = error()
    options = {"scheduler": FewStepScheduler(), "defaults": DEFAULTS}
    stage = DecoderStage(steps=80, muon_lr=0.02)
    train_decoder(tmp_path / "decoder", stage, vae, model, clips, references, **options)
    assert error() < 0.5 * wrong
    written = AutoencoderKLWan.from_pretrained(tmp_path / "decoder").state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], written[name])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_decoder_sees_samples_in_the_stages_precision_and_learns_in_float32(
    clips, tmp_path, monkeypatch, precision
):
    seen = []

    def drawn(model, clips, rows, *_):
        seen.append(torch.is_autocast_enabled("cpu"))
        return clips.latents(rows)

    def lost(difference, moving):
        seen.append(torch.is_autocast_enabled("cpu"))
        return decoder_loss(difference, moving)

    monkeypatch.setattr("kairos.training.parallel.has_bfloat16", lambda device: True)
    monkeypatch.setattr(decoder, "draw_latents", drawn)
    monkeypatch.setattr(decoder, "decoder_loss", lost)
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    references = {key: ClipReference(key, key, "", BUCKET, lambda: frames) for key in clips.keys}
    options = {"scheduler": FewStepScheduler(), "defaults": DEFAULTS, "precision": precision}
    vae, model = build_vae(base_dim=8), Wrong(clips, offset=0.0)
    train_decoder(tmp_path / "decoder", DecoderStage(steps=1), vae, model, clips, references, **options)
    assert seen == [precision == "bfloat16", False]


def test_a_decoders_training_that_was_killed_goes_on_where_its_weights_are_the_same(
    clips, tmp_path, monkeypatch
):
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    references = {key: ClipReference(key, key, "", BUCKET, lambda: frames) for key in clips.keys}
    drawn, steps = draw_latents, []

    def train(folder, kill_at=None, origins=None):
        def draw(*what):
            steps.append(folder)
            if kill_at == steps.count(folder):
                raise RuntimeError("killed")
            return drawn(*what)

        monkeypatch.setattr(decoder, "draw_latents", draw)
        torch.manual_seed(0)
        vae, model = build_vae(base_dim=8), Wrong(clips, offset=0.5)
        options = {"scheduler": FewStepScheduler(), "defaults": DEFAULTS, "origins": origins}
        train_decoder(tmp_path / folder, DecoderStage(steps=3), vae, model, clips, references, **options)
        return AutoencoderKLWan.from_pretrained(tmp_path / folder).state_dict()

    monkeypatch.setattr("kairos.training.minimise.SAVE_EVERY_S", -1.0)
    whole = train("whole", origins={"weights": "a"})
    with pytest.raises(RuntimeError, match="killed"):
        train("killed", kill_at=3, origins={"weights": "a"})
    again = train("killed", origins={"weights": "a"})
    assert steps.count("killed") == 3 + 1
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    with pytest.raises(RuntimeError, match="killed"):
        train("other", kill_at=3, origins={"weights": "b"})
    other = train("other", origins={"weights": "a"})  # learned from other weights: begun anew
    assert steps.count("other") == 3 + 3
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_a_sampled_clip_that_went_another_way_hardly_counts():
    generator = torch.Generator().manual_seed(0)
    near = 0.01 * torch.randn(2, 3, 5, 32, 32, generator=generator)
    far = torch.ones(1, 3, 5, 32, 32)
    usual = float(decoder_loss(near, 3.0))
    sampled = [float(decoder_loss(torch.cat([scale * far, near[1:]]), 3.0)) for scale in (1, 2)]
    known = [float(decoder_loss(torch.cat([near[:1], scale * far]), 3.0)) for scale in (1, 2)]
    assert sampled[1] - sampled[0] < 0.3 < sampled[0] - usual < 2
    assert known[1] - usual > 3.9 * (known[0] - usual) > 100
