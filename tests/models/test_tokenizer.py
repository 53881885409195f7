"""Messages to token ids and answers to token ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persyn_jax.config import ConfigError
from persyn_jax.models import tokenizer

TOK = tokenizer.byte_level()
EOS = TOK.eos_token_id
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def test_a_byte_is_a_token_and_specials_come_first():
    assert len(TOK) == 256 + 3
    assert TOK.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert EOS == 2


@given(text)
def test_any_text_comes_back(written):
    ids = tokenizer.response_ids(TOK, written, ended=False)
    assert len(ids) == len(written.encode())
    assert TOK.decode(ids, skip_special_tokens=True) == written


@given(text, st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>"]), text)
def test_special_tokens_spelled_out_in_an_answer_stay_text(before, special, after):
    ids = tokenizer.response_ids(TOK, before + special + after, ended=True)
    assert ids[-1] == EOS
    assert not {0, 1, 2} & set(ids[:-1])
    assert TOK.decode(ids, skip_special_tokens=True) == before + special + after


def test_a_prompt_ends_where_the_assistant_begins():
    messages = [{"role": "user", "content": "é\0?"}]
    ids = tokenizer.prompt_ids(TOK, messages)
    assert TOK.decode(ids) == "<|im_start|>user\né\0?<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(1) == 2
    assert ids.count(EOS) == 1


def test_tokenising_an_answer_does_not_change_how_prompts_are_read():
    messages = [{"role": "user", "content": "x"}]
    before = tokenizer.prompt_ids(TOK, messages)
    tokenizer.response_ids(TOK, "<|im_end|>", ended=True)
    assert tokenizer.prompt_ids(TOK, messages) == before


def test_messages_that_the_template_refuses_are_bad_input():
    tok = tokenizer.byte_level()
    tok.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match="refuses the messages: no system role"):
        tokenizer.prompt_ids(tok, [{"role": "system", "content": "x"}])


def test_half_a_surrogate_pair_is_bad_input():
    with pytest.raises(ConfigError, match="not valid Unicode"):
        tokenizer.prompt_ids(TOK, [{"role": "user", "content": "\ud83d"}])


def test_a_template_of_ones_own_takes_the_place_of_a_folders(tmp_path):
    TOK.save_pretrained(tmp_path)
    messages = [{"role": "user", "content": "x"}]
    mine = tokenizer.load_folder(tmp_path, "{{ messages[0].content }}!")
    assert tokenizer.render_chat(mine, messages) == "x!"
    (tmp_path / "chat_template.jinja").unlink()
    assert tokenizer.render_chat(tokenizer.load_folder(tmp_path, "mine"), messages) == "mine"
    with pytest.raises(ConfigError, match=r"needs a chat template .* `chat_template`"):
        tokenizer.load_folder(tmp_path)
    assert tokenizer.render_chat(tokenizer.byte_level("bytes"), messages) == "bytes"
