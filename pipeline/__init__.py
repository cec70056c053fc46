"""The method and the learning: backbones, masker, objectives, training, evaluation."""
