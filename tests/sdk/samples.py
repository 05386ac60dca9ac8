"""The samples of the public documentation, each as printed there, with its line breaks.

A reader changes two things: the host and the key (`mine`). Nothing else may be
changed here.
"""

from __future__ import annotations

HOST = "https://www.nbapi.com.cn"
KEY_WORD = "YOUR_API_KEY"

CURL = {
    "quick": r"""curl https://www.nbapi.com.cn/v1/chat/completions \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer YOUR_API_KEY" \
  -d '{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello"}]}'
""",
    "chat": r"""curl -X POST https://www.nbapi.com.cn/v1/chat/completions \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer YOUR_API_KEY" \
  -d '{"model": "gpt-4o", "messages": [{"role": "user", "content": "What is AI?"}], "temperature": 0.7}'
""",
    "responses": r"""curl -X POST https://www.nbapi.com.cn/v1/responses \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer YOUR_API_KEY" \
  -d '{"model": "gpt-4o", "input": "Explain quantum computing", "max_tokens": 500}'
""",
    "messages": r"""curl https://www.nbapi.com.cn/v1/messages \
  -H "Content-Type: application/json" \
  -H "x-api-key: YOUR_API_KEY" \
  -d '{"model": "claude-3-5-sonnet", "max_tokens": 1024, "messages": [{"role": "user", "content": "Hello Claude"}]}'
""",
    "embeddings": r"""curl -X POST https://www.nbapi.com.cn/v1/embeddings \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer YOUR_API_KEY" \
  -d '{"model": "text-embedding-3-small", "input": ["Hello world", "How are you"]}'
""",
    "images": r"""curl -X POST https://www.nbapi.com.cn/v1/images/generations \
  -H "Content-Type: application/json" \
  -H "Authorization: Bearer YOUR_API_KEY" \
  -d '{"model": "dall-e-3", "prompt": "A sunset over mountains", "size": "1024x1024"}'
""",
}

PYTHON = {
    "quick": """import openai

client = openai.OpenAI(
    api_key="YOUR_API_KEY",
    base_url="https://www.nbapi.com.cn"
)

response = client.chat.completions.create(
    model="gpt-4o",
    messages=[{"role": "user", "content": "Hello"}]
)
print(response.choices[0].message.content)
""",
    "chat": """import openai

client = openai.OpenAI(api_key="YOUR_API_KEY", base_url="https://www.nbapi.com.cn")
response = client.chat.completions.create(
    model="gpt-4o",
    messages=[
        {"role": "user", "content": "What is AI?"}
    ],
    temperature=0.7
)
print(response.choices[0].message.content)
""",
    "messages": """import anthropic

client = anthropic.Anthropic(api_key="YOUR_API_KEY")
response = client.messages.create(
    model="claude-3-5-sonnet",
    max_tokens=1024,
    messages=[
        {"role": "user", "content": "Hello Claude"}
    ]
)
print(response.content[0].text)
""",
}

PYTHON_STREAM = """import openai

client = openai.OpenAI(api_key="YOUR_API_KEY", base_url="https://www.nbapi.com.cn")

with client.chat.completions.create(
    model="gpt-4o",
    messages=[{"role": "user", "content": "Hello"}],
    stream=True,
) as stream:
    for text in stream.text_stream():
        print(text, end="", flush=True)
"""

PYTHON_RETRY = """import time
import random

def call_api_with_retry(client, **kwargs):
    max_retries = 3
    for attempt in range(max_retries):
        try:
            return client.chat.completions.create(**kwargs)
        except Exception as e:
            if 'rate_limit' in str(e):
                wait_time = (2 ** attempt) + random.uniform(0, 1)
                print(f"Rate limited, waiting {wait_time}s")
                time.sleep(wait_time)
            else:
                raise
    raise Exception("Max retries exceeded")
"""

JAVASCRIPT = {
    "quick": """const response = await fetch('https://www.nbapi.com.cn/v1/chat/completions', {
  method: 'POST',
  headers: {
    'Content-Type': 'application/json',
    'Authorization': 'Bearer YOUR_API_KEY'
  },
  body: JSON.stringify({
    model: 'gpt-4o',
    messages: [{role: 'user', content: 'Hello'}]
  })
});
const data = await response.json();
console.log(data.choices[0].message.content);
""",
    "chat": """const response = await fetch('https://www.nbapi.com.cn/v1/chat/completions', {
  method: 'POST',
  headers: {
    'Content-Type': 'application/json',
    'Authorization': 'Bearer YOUR_API_KEY'
  },
  body: JSON.stringify({
    model: 'gpt-4o',
    messages: [{role: 'user', content: 'What is AI?'}],
    temperature: 0.7
  })
});
const data = await response.json();
console.log(data.choices[0].message.content);
""",
    "messages": """const response = await fetch('https://www.nbapi.com.cn/v1/messages', {
  method: 'POST',
  headers: {
    'Content-Type': 'application/json',
    'x-api-key': 'YOUR_API_KEY'
  },
  body: JSON.stringify({
    model: 'claude-3-5-sonnet',
    max_tokens: 1024,
    messages: [{role: 'user', content: 'Hello Claude'}]
  })
});
const data = await response.json();
console.log(data.content[0].text);
""",
}

JAVASCRIPT_STREAM = r"""async function streamChat(prompt) {
  const response = await fetch('https://www.nbapi.com.cn/v1/chat/completions', {
    method: 'POST',
    headers: {
      'Content-Type': 'application/json',
      'Authorization': 'Bearer YOUR_API_KEY'
    },
    body: JSON.stringify({
      model: 'gpt-4o',
      messages: [{role: 'user', content: prompt}],
      stream: true
    })
  });

  const reader = response.body.getReader();
  const decoder = new TextDecoder();

  while (true) {
    const {done, value} = await reader.read();
    if (done) break;

    const chunk = decoder.decode(value);
    const lines = chunk.split('\n');

    for (const line of lines) {
      if (line.startsWith('data: ')) {
        const json = line.substring(6);
        const data = JSON.parse(json);
        // 处理每个块
        console.log(data.choices[0].delta);
      }
    }
  }
}
"""

QUERY_URL = "https://www.nbapi.com.cn/v1/chat/completions?api_key=YOUR_API_KEY"


def mine(sample: str, host: str, key: str) -> str:
    """Put one's own host and key into a sample, as its reader does."""
    assert HOST in sample or KEY_WORD in sample
    return sample.replace(HOST, host).replace(KEY_WORD, key)
