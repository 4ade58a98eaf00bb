"""Sizes of the models that run in a browser."""

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "intermediate_size": 256,
    # Heads of 64 and whole units of columns, as models have: a model with neither (32 features,
    # 4 heads, 48 in between) has a shader that SwiftShader needs gigabytes and minutes for.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    # The tokenizer's only special token; the usual ids are letters here.
    "bos_token_id": 0,
    "eos_token_id": 0,
}
