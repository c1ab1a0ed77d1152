from stages.judges import scoring


def test_length_control_is_defined_for_no_other_instructions() -> None:
    assert not scoring.is_canonical(["What are the names of some famous actors that started their careers on Broadway?"])
    assert not scoring.is_canonical([f"Instruction {index}" for index in range(805)])
