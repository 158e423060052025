"""A request before it is made: what it leaves to the model, what the model does not do, what is not there."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kairos.errors import UserError
from kairos.request import Request, did_you_mean

if TYPE_CHECKING:
    from kairos.pipeline import KairosPipeline

logger = logging.getLogger(__name__)


def as_used(request: Request, pipeline: "KairosPipeline") -> Request:
    """The request without what changes nothing in this model; what of that was asked for is said."""
    defaults = pipeline.config.defaults
    steps, own_steps = request.num_inference_steps, int(defaults["num_inference_steps"])
    if is_few_step(pipeline) and (taken := len(pipeline.scheduler.timesteps)) != (steps or own_steps):
        if steps is not None:
            logger.warning("this model samples in %d steps, whatever is asked for", taken)
        request = replace(request, num_inference_steps=taken)
    guidance = defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale
    if guidance > 1 and not is_guided(request, pipeline):
        if request.guidance_scale is not None:
            where = "" if is_few_step(pipeline) else "goes on from given frames and "
            logger.warning("this model %ssamples without guidance, whatever is asked for", where)
        request = replace(request, guidance_scale=(guidance := 1.0))
    if guidance <= 1 and request.negative_prompt:
        logger.warning("without guidance a negative prompt changes nothing")
        request = replace(request, negative_prompt="")
    return request


def is_few_step(pipeline: "KairosPipeline") -> bool:
    from kairos.schedulers import FewStepScheduler

    return isinstance(pipeline.scheduler, FewStepScheduler)


def is_guided(request: Request, pipeline: "KairosPipeline") -> bool:
    """Whether guidance leads any of the request's frames."""
    import kairos.pipeline

    defaults = pipeline.config.defaults
    guidance = defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale
    known_frames = int(bool(request.input_image or request.input_video))
    return guidance > 1 and not is_few_step(pipeline) and kairos.pipeline.is_guided(defaults, known_frames)


def check_request(request: Request, defaults: Mapping[str, Any], scale: int | None) -> None:
    """What a model with these defaults would find wrong with a request for a clip, the files it names too."""
    from kairos.data.media import shown_size

    request = request.completed(defaults)
    assert request.height and request.width
    shown_size(request.height, request.width, scale)
    if request.input_video:
        start_of_video(request)
    else:
        check_inputs(request)


def check_inputs(request: Request) -> None:
    """Read the request's image or the video's first frame, to fail now and not after the model is loaded."""
    from kairos.data.media import read_image, read_video

    if request.input_image:
        read_image(request.input_image)
    if request.input_video:
        read_video(request.input_video, max_frames=1)


def check_template(request: Request) -> None:
    """Refuse a prompt template that there is not."""
    from kairos.conditioning import TEMPLATES

    if request.template and request.template not in TEMPLATES:
        raise UserError(f"no prompt template {request.template!r}{did_you_mean(request.template, TEMPLATES)}")


def start_of_video(request: Request) -> Any:
    """The frames that a continuation begins with, (k, H, W, 3) uint8, k = 4n + 1.

    As many as asked for; else as many as the file has, up to half of the result.
    """
    from kairos.data.media import read_video

    assert request.num_frames is not None
    wanted = request.input_frames or (request.num_frames + 1) // 2
    frames = read_video(request.input_video, fps=request.fps, max_frames=wanted)
    if request.input_frames and len(frames) < wanted:
        there = f"{len(frames)} at {request.fps:g} fps"
        raise UserError(f"{wanted} frames of {request.input_video} are asked for, and it has {there}")
    return frames[: (len(frames) - 1) // 4 * 4 + 1]
