"""What a package that extends minipeft looks like: importing it registers a method and a layer type."""

from minipeft_sample.int8 import Int8Linear, Int8Ops
from minipeft_sample.rank_one import RankOne, RankOneConfig

__all__ = ["Int8Linear", "Int8Ops", "RankOne", "RankOneConfig"]
