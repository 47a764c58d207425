"""The local inference server: OpenAI's audio API in front of packages, students and teachers."""
