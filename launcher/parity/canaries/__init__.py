"""Every behaviour of DeepSpeed that Halfstep's repairs, policies and rules rest on, looked at on the installed one."""

from launcher.parity.canaries import config, gradients, scaling, stage_0
from launcher.parity.canaries.bench import Canary

CANARIES: tuple[Canary, ...] = (*stage_0.CANARIES, *scaling.CANARIES, *gradients.CANARIES, *config.CANARIES)
