"""From a recipe to a trained adapter, on TRL's SFTTrainer."""
