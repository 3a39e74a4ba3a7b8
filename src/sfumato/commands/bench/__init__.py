"""`sfumato bench`: measure one model on this machine, over HTTP, as its clients would."""
