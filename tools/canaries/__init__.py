"""Every behaviour of DeepSpeed that Halfstep's repairs, policies and rules rest on, looked at on the installed one."""

from tools.canaries import defaults, gradients, scaling, stage_0
from tools.canaries.bench import Canary

CANARIES: tuple[Canary, ...] = (*stage_0.CANARIES, *scaling.CANARIES, *gradients.CANARIES, *defaults.CANARIES)
