"""The page of a study."""


def render(study, results, about):
    return "", {}
