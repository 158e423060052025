"""Schedules of noise: the shifted flow-matching one, and the few fixed steps of distilled models."""

from kairos.schedulers.few_step import FewStepScheduler
from kairos.schedulers.flow_match import FlowMatchScheduler, SchedulerOutput, shift_for
from kairos.schedulers.noise import draw_noise

__all__ = ["FewStepScheduler", "FlowMatchScheduler", "SchedulerOutput", "draw_noise", "shift_for"]
