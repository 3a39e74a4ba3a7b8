"""The training of ``sfumato-tiny``, the text-to-image model that ships with Sfumato."""
