"""OpenAI's chat completions for picture models: the last message is the prompt, the answer has pictures."""
