"""A short soak: a hundred steps hold no more than fifty did. benchmarks/soak.py is the long one."""

import mmap
import os

import pytest
import torch

from benchmarks.soak import RSS_KIB, SAMPLES, growth, train_and_sample
from tests.launch import run_ranks

WORLD = 2
STEPS = 5 * SAMPLES
leaked: list = []


def leak_everything(step):
    pages = mmap.mmap(-1, 2**20)  # new pages: an allocator may have free ones of earlier tests
    pages.write(bytes([1]) * len(pages))
    leaked.append(pages)
    leaked.append(os.dup(0))
    if step % 5 == 0:
        torch.distributed.new_group()


@pytest.mark.slow
def test_a_hundred_steps_leave_nothing_behind(tmp_path):
    for samples, _ in run_ranks(train_and_sample, WORLD, STEPS, tmp_path, deepspeed=True):
        assert len(samples) == SAMPLES
        grown = growth(samples)
        assert grown["rss_kib"] < RSS_KIB, samples
        assert grown["descriptors"] <= 0, samples
        assert grown["groups"] == 0, samples
        assert grown["threads"] <= 0, samples


def test_leaks_are_seen(tmp_path):
    arguments = (WORLD, 2 * SAMPLES, tmp_path, leak_everything)
    for samples, _ in run_ranks(train_and_sample, *arguments, deepspeed=True):
        grown = growth(samples)
        assert grown["rss_kib"] > RSS_KIB, samples
        assert grown["descriptors"] > 0
        assert grown["groups"] > 0
        assert grown["threads"] > 0
