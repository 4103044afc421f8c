"""Policies as text."""

import pytest

from fastdiff.cache import Broadcast, DeepCache, EncoderPropagation, FirstBlock, Forecast
from fastdiff.cache.parse import parse


@pytest.mark.parametrize(
    "text, policy",
    [
        ("broadcast:4", Broadcast(4)),
        ("broadcast:0+1+4,feed_forward=2,order=1", Broadcast([0, 1, 4], 3, 2, order=1)),
        ("deepcache", DeepCache()),
        ("deepcache:5", DeepCache(5)),
        ("deepcache:5,branch=2,schedule=quad,center=4,power=1.4", DeepCache(5, 2, "quad", 4, 1.4)),
        ("deepcache:schedule=0+1+5", DeepCache(schedule=[0, 1, 5])),
        ("encoder:50ls,parallel=8", EncoderPropagation("50ls", parallel=8)),
        ("encoder:3,inject=0.003", EncoderPropagation(3, inject=0.003)),
        ("firstblock:0.1", FirstBlock(0.1)),
        ("taylor:3,order=2,last=true", Forecast(3, 2, last=True)),
    ],
)
def test_text_is_a_policy(text, policy):
    assert parse(text) == policy


@pytest.mark.parametrize(
    "text, need",
    [
        ("magic:3", "cache is 'magic:3', need one of accumulated, broadcast, deepcache, encoder"),
        ("", "cache is ''"),
        ("deepcache:3,5", "'5' does not fit"),
        ("deepcache:3,depth=1", "'depth=1' does not fit, need name=value, with names of interval"),
        ("deepcache:3,interval=4", "'interval=4' does not fit"),
        ("deepcache:0", "interval is 0, need an integer of at least 1"),
        ("deepcache:often", "interval is 'often'"),
        ("firstblock:much", "threshold is 'much'"),
        ("encoder:60ls", "key_steps is '60ls'"),
        ("encoder:3,inject=no", "inject is 'no'"),
        ("deepcache:3,power=big", "power is 'big'"),
    ],
)
def test_bad_text(text, need):
    with pytest.raises(ValueError, match=need):
        parse(text)
