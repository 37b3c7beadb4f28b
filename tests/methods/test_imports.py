"""What `htv.methods` exports. That it brings no extra with it: tests/test_extras.py."""

import htv.methods


def test_every_public_name_is_there():
    assert [name for name in htv.methods.__all__ if not hasattr(htv.methods, name)] == []
    assert len(set(htv.methods.__all__)) == len(htv.methods.__all__)
