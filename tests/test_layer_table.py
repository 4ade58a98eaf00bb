from fairy_compile.layer_table import fold_layers


def test_layers_that_differ_only_in_number_are_folded():
    rows = [(f"model.layers.{i}.{part}", (part,)) for i in (0, 1, 2, 5) for part in ("q", "o")]
    rows.insert(3, ("lm_head", ("h",)))
    assert fold_layers(rows) == [
        ("model.layers.0-2,5.q", 4, ("q",)),
        ("model.layers.0-2,5.o", 4, ("o",)),
        ("lm_head", 1, ("h",)),
    ]


def test_layers_with_other_cells_stay_apart():
    rows = [("l.0.q", ("a",)), ("l.1.q", ("b",)), ("l.2.q", ("a",))]
    assert fold_layers(rows) == [("l.0,2.q", 2, ("a",)), ("l.1.q", 1, ("b",))]
