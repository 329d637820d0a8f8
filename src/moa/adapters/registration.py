"""Making ``MOA`` a PEFT method like any other.

PEFT keeps its methods in a closed enum and its public ``register_peft_method`` refuses names outside it, so the enum
gets one more member first. Nothing of PEFT is replaced or patched here; everything that PEFT looks up by method name
(saving, loading, ``AutoPeftModel``, transformers' ``load_adapter``) then finds MoA. The one thing no registration can
do is import us: where the distribution is installed, ``moa_autoload`` does when an adapter is loaded.
"""

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import register_peft_method

from moa import _hosts

MOA = _hosts.append_method("MOA")


def register(config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Tell PEFT which classes belong to ``MOA``.

    Raises:
        RuntimeError: another package has registered a different method under this name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(MOA)
    if known is None:
        register_peft_method(name="moa", config_cls=config, model_cls=tuner, prefix="moa_")
    elif (known.__module__, known.__qualname__) != (config.__module__, config.__qualname__):
        raise RuntimeError(f"PEFT already has a method called MOA, from {known.__module__}.")
