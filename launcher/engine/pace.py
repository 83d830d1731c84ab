"""STUB by the lead until helper A writes this file; overwrite it."""

import contextlib


class Pace:
    def __init__(self, engine, plan):
        pass

    def forward(self):
        return contextlib.nullcontext()

    def seconds(self):
        return 0.0


class Stragglers:
    def __init__(self, world_size, factor):
        pass

    def see(self, step, seconds):
        return None
