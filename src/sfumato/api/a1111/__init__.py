"""The part of AUTOMATIC1111's API that its clients use."""
