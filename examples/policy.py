"""Render a chat to token ids, sample from the policy, see ids, logprobs and version."""

import grpc

from regreen.client.script import words
from regreen.policy import v1 as pb

channel = grpc.insecure_channel(words("127.0.0.1:50053")[0])
policy = pb.PolicyServiceStub(channel)
question = pb.ChatMessage(role="user", content="What is the capital of France?")
prompt = policy.RenderChat(pb.RenderChatRequest(messages=[question]), timeout=30).token_ids
request = pb.GenerateRequest(
    prompt_token_ids=prompt, n=2, sampling=pb.Sampling(temperature=0.7, max_new_tokens=16, seed=1)
)
for sample in policy.Generate(request, timeout=300).completions:
    spans = [(span.version, span.start, span.end) for span in sample.versions]
    print(repr(sample.text), len(sample.token_ids), "ids, versions", spans)
    print("  mean logprob", round(sum(sample.logprobs) / len(sample.logprobs), 3))
print(pb.SleepState.Name(policy.GetPolicy(pb.GetPolicyRequest(), timeout=30).sleep))
