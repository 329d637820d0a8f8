"""Mixture of Adapters: experts of different structure under one router per decoder block, as a PEFT method."""

from moa.adapters.config import MoAConfig
from moa.adapters.model import MoAModel
from moa.adapters.registration import register

register(MoAConfig, MoAModel)
