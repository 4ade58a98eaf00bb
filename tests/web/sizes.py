"""Sizes of the models that run in a browser."""

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 256,
    # Heads of 64, as models have: with heads of 8, SwiftShader takes gigabytes for a shader.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    # The tokenizer's only special token; the usual ids are letters here.
    "bos_token_id": 0,
    "eos_token_id": 0,
}
