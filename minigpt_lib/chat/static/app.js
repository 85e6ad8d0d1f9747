// What the page does without asking the server. Loaded with the two components that use it, so it may run twice.
window.minigpt = {
  // The conversation: messages come as data and go into the page as text, never as HTML, so nothing needs escaping.
  // While a reply grows only the new letters are added: a selection stays, a screen reader does not start over.
  talk(element, props, trigger, watch) {
    const make = (kind, given = {}) => Object.assign(document.createElement(kind), given);
    const log = make('div', {className: 'log', tabIndex: 0, role: 'log', ariaLabel: 'Conversation'});
    const why = 'the conversation has outgrown its positions';
    const forgot = make('p', {className: 'forgot', textContent: `The model no longer reads what is above: ${why}.`});
    const hello = make('div', {className: 'hello'}), rows = log.getElementsByTagName('article');
    hello.append(...(props.hello || []).map((textContent) => make('p', {textContent})));
    log.append(hello);
    element.after(log);
    const button = (name, act) => {
      const made = make('button', {type: 'button', className: name, textContent: name});
      made.onclick = () => act(made);
      return made;
    };
    const copy = async (made) => {
      await navigator.clipboard.writeText(made.closest('article').firstChild.textContent);
      made.textContent = 'Copied';
      setTimeout(() => { made.textContent = 'Copy'; }, 1500);
    };
    const row = (role, n) => {
      const [made, text, acts] = ['article', 'p', 'div'].map((kind) => make(kind));
      const other = role === 'user' ? ['Edit', 'edit'] : ['Tokens', 'select'];
      made.setAttribute('aria-label', role === 'user' ? 'You' : 'MiniGPT');
      text.append('');
      acts.append(button('Copy', copy), button(other[0], () => trigger(other[1], {index: n})));
      made.append(text, acts);
      return log.appendChild(made);
    };
    const draw = () => {
      const messages = props.value || [], grew = messages.length > rows.length;
      const low = grew || log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      while (rows.length > messages.length) rows[rows.length - 1].remove();
      messages.forEach((message, n) => {
        const made = rows[n] || row(message.role, n), text = made.firstChild.firstChild, said = message.content;
        if (said.startsWith(text.data)) text.appendData(said.slice(text.data.length));
        else text.data = said;
        const marks = ['busy', 'gone', 'going', 'editing', 'looked'].filter((mark) => message[mark]);
        made.className = [message.role, ...marks].join(' ');
        if (message.role === 'user') made.lastChild.lastChild.textContent = message.editing ? 'Cancel' : 'Edit';
      });
      const first = messages.findIndex((message) => !message.gone);
      if (first < 1) forgot.remove();
      else if (forgot.nextSibling !== rows[first]) log.insertBefore(forgot, rows[first]);
      if (low) log.scrollTop = log.scrollHeight;
    };
    watch('value', draw);
    draw();
  },

  // The small pictures of all heads: tells which one was chosen.
  heads(element, trigger) {
    element.addEventListener('change', ({target}) => {
      const [layer, head] = target.id.split('-').slice(1).map(Number);
      trigger('select', {layer, head});
    });
  },
  mark(...values) {
    const [, layer, head] = values, chosen = document.getElementById(`head-${layer}-${head}`);
    if (chosen) chosen.checked = true;
    return values;
  },

  // Where one goes on: in the message box, or at the table that was asked for.
  focus() { document.querySelector('#message textarea')?.focus({preventScroll: true}); },
  reveal() { document.getElementById('choices')?.scrollIntoView({block: 'nearest', behavior: 'smooth'}); },

  // Each tab keeps its own conversation; a new tab begins with the one that was written last (Gradio's BrowserState).
  recall(name, latest) {
    this.ready = true;
    if (matchMedia('(min-width: 1200px)').matches) document.querySelector('#settings button[class*=label]')?.click();
    try {
      return JSON.parse(sessionStorage.getItem(name)) ?? latest;
    } catch {
      return latest;  // something else wrote there
    }
  },
  keep(name, talk) { if (this.ready) sessionStorage.setItem(name, JSON.stringify(talk)); },
};
