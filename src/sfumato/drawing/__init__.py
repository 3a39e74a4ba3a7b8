"""One picture on one pipeline: arguments, scheduler, capabilities, previews."""
