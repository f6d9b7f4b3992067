from preprocessing.shards.schema import IMAGE_COLUMNS, KINDS, SAMPLE_COLUMN


def test_every_kind_has_its_columns() -> None:
    for kind, schema in KINDS.items():
        assert {*IMAGE_COLUMNS[kind], SAMPLE_COLUMN[kind], "split"} <= set(schema.names)
