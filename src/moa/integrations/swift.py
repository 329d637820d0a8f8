"""ms-swift: a tuner type ``moa``, and a callback of that name that logs the routers.

ms-swift reads plug-ins from files, so one of yours says which mixture (and needs no more than this):

.. code-block:: python

    import moa
    from moa.integrations.swift import register

    register(moa.preset("soft-moa", r=16))

Then ``swift sft --external_plugins that_file.py --tuner_type moa --callbacks moa ...``.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from swift import PeftTuner, TrainerCallback, callbacks_map, tuners_map

from moa.training.routing import log_router


class LogRouter(TrainerCallback):
    """`moa.integrations.log_router`, put in place when the trainer is complete."""

    done = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.done:  # an entry ahead of this one in the list makes the list come here once more
            self.done = True
            log_router(self.trainer)


def register(config: PeftConfig) -> None:
    """Make ``--tuner_type moa`` train this mixture. ms-swift's ``lora_...`` settings have no effect on it."""

    class MoATuner(PeftTuner):
        @staticmethod
        def prepare_model(args: Any, model: Any) -> PeftModel:
            return get_peft_model(model, copy.deepcopy(config))

    tuners_map["moa"] = MoATuner
    callbacks_map["moa"] = LogRouter
