"""What a decoder in Core ML is held against: the same operations in PyTorch, without any cache."""

import numpy as np
import torch


def expected_logits(decoder, ops, conversation, count):
    """The module on the first so many tokens at once.

    Args:
        decoder: The component.
        ops: `TorchOps`, or what differs from it as the program is known to.
        conversation: Embeddings [S, H] and image blocks [S].
        count: Tokens.

    Returns:
        [1, 1, vocabulary].
    """
    embeddings, blocks = conversation
    feeds = {
        "inputs_embeds": embeddings[None, :count],
        "position_ids": np.arange(count)[None],
        "image_blocks": blocks[None, :count],
        "attention_mask": np.ones((1, count), np.int64),
        "local_start": np.array([0]),
    }
    for spec in decoder.inputs:
        if spec.name.startswith("past"):
            feeds[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), np.float32)
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        return decoder.forward(ops, tensors)["logits"].numpy()
