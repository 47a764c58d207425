"""Processors of models that also see, where torchvision, which only their image and video parts need, is missing."""

from pathlib import Path
from typing import Any


def load_hearing(path: Path, processor_class: str, extractor_class: str) -> Any | None:
    """The stock processor of a model directory without its image and video parts; None where all can be loaded.

    Args:
        processor_class: name of the transformers class.
        extractor_class: name of its feature extractor's class.
    """
    from transformers.utils.import_utils import is_torchvision_available

    if is_torchvision_available():
        return None
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    extractor = getattr(transformers, extractor_class).from_pretrained(
        str(path), local_files_only=True
    )
    template = path / "chat_template.jinja"
    return _without_images(getattr(transformers, processor_class))(
        feature_extractor=extractor,
        image_processor=None,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=template.read_text(encoding="utf8") if template.is_file() else None,
    )


def _without_images(stock: Any) -> Any:
    """The stock processor class, content without an image and a video processor."""

    class HearingProcessor(stock):
        """Reads text and hears; saved, it would not load anywhere else."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            """As stock, but a part may be missing."""
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def get_attributes(cls) -> list[str]:
            """The stock class's parts, whose names it reads off its own __init__."""
            parts: list[str] = stock.get_attributes()
            return parts

    return HearingProcessor
