"""Captions with the trigger word replaced by its class: what differential output preservation keeps.

As ai-toolkit does it: the plain text is replaced wherever it stands, upper and lower case apart.
"""

from __future__ import annotations

from collections.abc import Iterable

from hyimg.config.network import ClassCaptions
from hyimg.data.sample import Sample
from hyimg.errors import HyimgError


def class_caption(prompt: str, options: ClassCaptions) -> str:
    """A prompt with `--diff_output_preservation_class` in the place of `--trigger_word`."""
    assert options.trigger_word is not None
    assert options.diff_output_preservation_class is not None
    return prompt.replace(options.trigger_word, options.diff_output_preservation_class)


def check_class_captions(options: ClassCaptions) -> None:
    """Raises HyimgError where one of the two options is there without the other, or says nothing."""
    trigger_word, class_text = options.trigger_word, options.diff_output_preservation_class
    if (trigger_word is None) != (class_text is None):
        given, missing = "--trigger_word", "--diff_output_preservation_class"
        if trigger_word is None:
            given, missing = missing, given
        raise HyimgError(f"`{given}` without `{missing}`", hint="give both, or neither")
    if trigger_word is not None and not trigger_word.strip():
        raise HyimgError("`--trigger_word` is empty", hint="give the word that the captions have")
    if trigger_word is not None and trigger_word == class_text:
        raise HyimgError(
            f"`--trigger_word` and `--diff_output_preservation_class` are both `{trigger_word}`",
            hint="the class is what stays as it is: say `woman` where the trigger word is `ohwx woman`",
        )


def class_captions(samples: Iterable[Sample], options: ClassCaptions) -> list[str]:
    """Every distinct class caption that training on `samples` may show; none where the options are not given.

    Raises HyimgError as `check_class_captions`, and where no caption has the trigger word.
    """
    check_class_captions(options)
    if options.trigger_word is None:
        return []
    prompts = dict.fromkeys(prompt for sample in samples for prompt in sample.prompts)
    if not any(options.trigger_word in prompt for prompt in prompts):
        raise HyimgError(
            f"`--trigger_word` `{options.trigger_word}` stands in no caption",
            hint="give the word as the captions write it, upper and lower case too",
        )
    return list(dict.fromkeys(class_caption(prompt, options) for prompt in prompts))
