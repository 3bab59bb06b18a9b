"""Who runs in the next step, and with how many tokens. Pure Python."""

from jaxllm.scheduler.plan import PageUpdate, RowPlan, StepPlan
from jaxllm.scheduler.request import Request, RequestStatus
from jaxllm.scheduler.scheduler import Scheduler, SchedulerStats

__all__ = ["PageUpdate", "Request", "RequestStatus", "RowPlan", "Scheduler", "SchedulerStats", "StepPlan"]
